"""Read the files that a run has written. Everything wrong with one is a UserError: which file, what is
wrong, what to do.

Kills never damage a file: every file is replaced whole, and of appended lines only the last can be torn.
Disks, copies, editors and sync programs do damage files. So every reader names the shape that a file must
have, and gets content that has it or one sentence.
"""

import hashlib
import json
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_origin

from pydantic import AfterValidator, TypeAdapter, ValidationError

from lowmem_rmu.errors import Fix, UserError

T = TypeVar("T")
DIGESTS = "digests.json"
"""In a run folder: sha256 of files that no other file describes, by their paths within the folder."""
Object = dict[str, Any]
"""The shape of any JSON object."""


@dataclass(frozen=True)
class Config:
    """The shape of `config.json`. Runs of older versions may lack some of it."""

    preset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    device_name: str = ""
    seed: int = 0
    model_revision: str | None = None
    created: Annotated[str, AfterValidator(datetime.fromisoformat)] = ""


@dataclass(frozen=True)
class Status:
    """The shape of `status.json`."""

    stage: str = ""
    step: int = 0
    total: int = 0
    state: str = "interrupted"
    pid: int = 0
    heartbeat: float = 0.0
    error: str | None = None
    stage_began: float | None = None
    started: float | None = None
    """When the process started; runs of earlier versions have none."""
    problem: str | None = None
    """The error in its parts: what is wrong, what to do, and the action that `fix` names; for a mistake of
    the user only.
    """
    fix: str | None = None
    action: dict[str, Any] | None = None


@dataclass(frozen=True)
class StageCost:
    """The shape of an entry of `stages.json`."""

    stage: str
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Answer:
    """The answer to a question: a line of `evaluation/answers_*.jsonl`."""

    task: str
    index: int
    """The question's place in its task."""
    prompt: str
    """The digest of the prompt."""
    logprobs: list[float] | None
    """Of the choices; None where a model gives none."""
    answer: int | None
    """The choice; None where a model named none, which is a wrong answer."""
    gold: int
    """The right choice."""
    correct: bool


@dataclass(frozen=True)
class KnownAnswer:
    """The shape of an answer that is kept for other runs of the same model."""

    prompt: str
    logprobs: list[float]


@dataclass(frozen=True)
class TaskMark:
    """The shape of an answer as far as a running count needs it."""

    task: str
    correct: bool


@dataclass(frozen=True)
class HeldOutText:
    """The shape of what was measured on a held-out text."""

    tokens: int
    loss: float
    stderr: float
    bits_per_byte: float
    kl: float | None = None
    kl_stderr: float | None = None


@dataclass(frozen=True)
class SampleAnswer:
    """The shape of a prompt of the preset with its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TaskScore:
    """The shape of a task's score, as far as others rely on it."""

    questions: int


@dataclass(frozen=True)
class Scores:
    """The shape of `evaluation/base.json` and `evaluation/unlearned.json`."""

    tasks: dict[str, TaskScore]
    texts: dict[str, HeldOutText] = field(default_factory=dict)
    samples: list[SampleAnswer] = field(default_factory=list)
    answers_sha256: str | None = None
    """Of the answers that were scored; runs of older versions have none."""


@dataclass(frozen=True)
class StepRow:
    """The shape of a line of `metrics.jsonl`, as far as it is shown."""

    step: int
    topic: str
    forget_loss: float
    retain_loss: float
    forget_norm: float | None = None
    retain_norm: float | None = None
    forget_cosine: float | None = None
    retain_cosine: float | None = None
    retain_kl: float | None = None
    question_kl: float | None = None
    topic_kl: float | None = None
    topic_question_kl: float | None = None
    retain_shift: float | None = None
    question_shift: float | None = None
    topic_shift: float | None = None
    topic_question_shift: float | None = None
    tokens: int = 0
    sinks: int = 0
    """Positions that are attention sinks; runs of earlier versions have neither."""


@dataclass(frozen=True)
class Condition:
    """One way in which an attack was tried, and what it brought back: means over the items of the audit."""

    condition: str
    attacked: float
    """What the attacked model knows: accuracy as a share or, for text, nats/token (less is better known)."""
    recovered: float | None
    """The share of what was lost that came back, with its interval; None where nothing was lost."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class AttackResult:
    """One attack in `audit.json`. Where it was not run, `reason` says why, and the rest is empty."""

    attack: str
    asks: str
    state: Literal["done", "not run"]
    reason: str | None = None
    foretold_seconds: float | None = None
    """The estimate."""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    best: Condition | None = None
    """Chosen by one half of the items and measured on the other; None where the attack asks something other
    than what can be recovered.
    """
    finding: str | None = None
    conditions: tuple[Condition, ...] = ()
    sentences: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Curves and tables of this attack."""


@dataclass(frozen=True)
class AuditVerdict:
    """The verdict of an audit: one mark, and sentences that explain it."""

    mark: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class ControlModel:
    """What the audit found of a model of which the truth is known."""

    name: str
    about: str
    mark: str
    attacks: dict[str, Condition | None]
    base: float | None = None
    unlearned: float | None = None


@dataclass(frozen=True)
class AuditResult:
    """The content of `audit.json`."""

    run: str
    items: int
    measured_in: str
    base: float
    unlearned: float
    verdict: AuditVerdict
    attacks: tuple[AttackResult, ...]
    controls: tuple[ControlModel, ...]
    floor: float | None = None
    """What recovery counts from; audits of earlier versions have none."""

    @property
    def is_accuracy(self) -> bool:
        """Whether questions were asked; else losses on text were measured."""
        return self.measured_in == "accuracy"


@dataclass(frozen=True)
class StepTime:
    """The shape of a line of `metrics.jsonl`, as far as the time that is left needs it."""

    seconds: float


def read_record(path: Path, kind: type[T], what_next: str | Fix) -> T:
    """Read a JSON file as a record: a dataclass, or another type that pydantic checks (strictly).

    Raises UserError, which ends with `what_next`.
    """
    return _parsed(_read_bytes(path, what_next), kind, str(path), what_next)


def checked_json(path: Path, shape: Any, what_next: str | Fix) -> Any:
    """Read a JSON file whose content fits `shape` as it is: keys beyond the shape are kept.

    Raises UserError, which ends with `what_next`.
    """
    content = _read_bytes(path, what_next)
    _parsed(content, shape, str(path), what_next)
    return json.loads(content)


def read_rows(path: Path, kind: type[T], what_next: str | Fix) -> list[T]:
    """Read every line of a JSONL file as a record. Only a last line without a line break may be torn: it is
    left out.

    Raises UserError, which ends with `what_next`.
    """
    *lines, last = _read_bytes(path, what_next).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        rows.append(_parsed(line, kind, f"{path}, line {number},", what_next))
    with suppress(UserError):
        rows.append(_parsed(last, kind, "", ""))
    return rows


def intact_rows(path: Path, kind: type[T]) -> list[T]:
    """Read the lines of a JSONL file that are such records, and leave the others out; empty without a file.

    For rows that are computed again where they are missing, and for a file that another process is writing.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(UserError):
            rows.append(_parsed(line, kind, "", ""))
    return rows


def intact_record(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file as a record; None where it is missing or damaged.

    For what is only shown, or written again anyway.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    with suppress(UserError):
        return _parsed(content, kind, "", "")
    return None


def as_json(record: Any) -> Any:
    """Return what a file holds of a record: the fields of a dataclass in their order."""
    return vars(record) if is_dataclass(record) else record


def check_digest(path: Path, recorded: Any, what_next: str | Fix) -> None:
    """Raise UserError where the file is not the one whose sha256 was recorded (None: nothing was)."""
    if recorded is not None and file_digest(path) != recorded:
        raise UserError(
            f"{path} is damaged, or was changed: its sha256 is not the one that the run recorded.",
            what_next,
        )


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Recorded(dict[str, Any]):
    """What `config.json` holds. A key that is not there is a UserError, for a run of this version has them
    all.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            checked_json(path, Config, f"Put the file back from a copy, or delete the folder {path.parent}.")
        )
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        raise UserError(
            f"{self.path} was written by another version of this program, or is damaged: it lacks {key}.",
            f"Put the file back from a copy, or delete the folder {self.path.parent}.",
        )


def _read_bytes(path: Path, what_next: str | Fix) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}.",
            what_next,
        ) from error


def _parsed(content: bytes, kind: type[T], place: str, what_next: str | Fix) -> T:
    """Return the content as a record. Raises UserError, which begins with its place."""
    try:
        checker: TypeAdapter[T] = _checker(cast(Hashable, kind))
        return checker.validate_json(content, strict=True)
    except ValueError as error:  # pydantic's own error is one
        raise UserError(f"{place} {_complaint(error, kind)}.", what_next) from error


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _complaint(error: ValueError, shape: Any) -> str:
    """Return the first mistake as the end of a sentence about the content."""
    problem = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
    if problem is None or not problem["loc"]:
        return f"is damaged: it does not hold a JSON {'list' if get_origin(shape) is list else 'object'}"
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"was written by another version of this program, or is damaged: it lacks {key}"
    return (
        f"is damaged: {key} "
        f"{problem['msg'].removeprefix('Value error, ').replace('Input should be', 'should be')}"
    )
