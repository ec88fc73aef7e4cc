"""`python -m lowmem_rmu evaluate`: any model, adapter or run on any tasks, into a separate folder."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowmem_rmu.config.loading import override
from lowmem_rmu.config.paths import as_path, is_local, resolve_paths, short_name
from lowmem_rmu.config.schema import Evaluation, ModelSettings, known_tasks
from lowmem_rmu.data.questions import QuestionSet, load_questions, unasked_subjects
from lowmem_rmu.data.sources import find_task_sources, sources_record
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.errors import UserError, command_line, nearest
from lowmem_rmu.evaluation.compare import compare_tasks
from lowmem_rmu.evaluation.endpoint import Endpoint, evaluate_endpoint
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.kept import evaluate_and_keep, fixed_batch_tokens, shared_answers
from lowmem_rmu.evaluation.multiple_choice import Interrupted
from lowmem_rmu.evaluation.summary import EvaluationSummary
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.identity import content_digest
from lowmem_rmu.model.saved import CONFIG, WEIGHTS, read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import add_lines, make_private, read_lines, write_json, write_lines
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import differences, read_preset, recorded_evaluation
from lowmem_rmu.runs.records import Answer, Object, checked_json, intact_record
from lowmem_rmu.runs.status import Stopped, Watcher


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, and an adapter on it where there is one."""

    spec: ModelSpec
    adapter: Path | None = None

    @property
    def sides(self) -> list[str]:
        return ["base", "unlearned"] if self.adapter else ["base"]

    @property
    def name(self) -> str:
        model = short_name(self.spec.name)
        return f"{model} with {short_name(str(self.adapter.resolve()))}" if self.adapter else model

    @property
    def file_name(self) -> str:
        return as_file_name(Path(self.adapter.resolve().parent if self.adapter else self.spec.name).name)

    def digest(self, base: str) -> str:
        """Combine the model's digest with the adapter's."""
        return f"{base}+{content_digest(self.adapter / WEIGHTS)[:24]}" if self.adapter else base


def as_file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", model)


def find_subject(name: str, quantisation: str | None = None, dtype: str | None = None) -> Subject:
    """Return a run's folder, an adapter's, a model's, or a Hub id. What is given of the precision overrides
    what a run says.
    """
    path, precision = (
        as_path(name),
        {key: value for key, value in (("quantisation", quantisation), ("dtype", dtype)) if value},
    )
    if (path / CONFIG).is_file():
        adapted = read_adapter_settings(path)
        settings = ModelSettings.model_validate(
            {"name": base_of(path, adapted), "revision": adapted.get("revision")} | precision
        )
        return Subject(ModelSpec(settings, trained=adapted.get("modules_to_save") or ()), path)
    if is_run(path):
        folder = RunFolder(path)
        spec = ModelSpec.of_preset(read_preset(folder)).with_precision(**precision)
        if folder.adapter.exists():
            read_adapter_settings(folder.adapter)
        return Subject(spec, folder.adapter if folder.adapter.exists() else None)
    local = str(path.resolve()) if path.exists() else name
    return Subject(ModelSpec(ModelSettings.model_validate({"name": local} | precision)))


def base_of(adapter: Path, settings: dict[str, Any]) -> str:
    """Return the model that an adapter names as its base: a folder, from here or from the adapter's own
    folder, else a Hub id.

    Raises UserError where it names none.
    """
    name = settings.get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"The adapter {adapter} does not name the model that it belongs to.",
            "Write it into its adapter_config.json, as base_model_name_or_path: a folder or a Hub id.",
        )
    for folder in (Path(name).expanduser(), adapter / name):
        if folder.is_dir():
            return str(folder.resolve())
    return str(name)


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's, and not a model's: both have a config.json, which may be
    damaged.
    """
    config = path / "config.json"
    return config.is_file() and (
        "settings" in (intact_record(config, Object) or {}) or (path / "evaluation").is_dir()
    )


def choose_tasks(
    names: str, num_fewshot: int | None, changes: list[str], limit: int | None, batch_tokens: int | str
) -> Evaluation:
    """Resolve `--tasks`: tasks of `tasks.yaml`, a group of them (`wmdp`), an average (`mmlu_stem`), a subject
    (`mmlu_virology`), or the path of own questions.

    `changes` are `TASK.KEY=VALUE`. Raises UserError.
    """
    tasks: dict[str, dict[str, Any]] = {}
    named = [name.strip() for name in names.split(",") if name.strip()]
    for name in named:
        if is_local(name):
            task = Path(name).stem
            if task in tasks or task in named:
                others = [
                    other
                    for other in named
                    if other == task or (is_local(other) and Path(other).stem == task and other != name)
                ]
                raise UserError(
                    f"--tasks names two tasks that would both be called {task}: {', '.join([*others, name])}"
                    ".",
                    "Rename one of them.",
                )
            tasks[task] = {"source": name, "role": "measured"}
    for task, subjects in [each for name in named if not is_local(name) for each in _named(name)]:
        chosen = tasks.setdefault(task, {})
        if subjects:
            chosen["subjects"] = [*chosen.get("subjects", []), *subjects]
    if not tasks:
        raise UserError(f"--tasks names no task. There is: {', '.join(sorted(known_tasks()))}.")
    if num_fewshot is not None:
        tasks = {name: settings | {"num_fewshot": num_fewshot} for name, settings in tasks.items()}
    for change in changes:
        override(tasks, change)
    content = {"tasks": resolve_paths(tasks, Path.cwd(), set()), "limit": limit, "batch_tokens": batch_tokens}
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise UserError("The tasks cannot be asked so:\n" + "\n".join(lines)) from error


def _named(name: str) -> list[tuple[str, list[str] | None]]:
    """Return the known tasks that a name stands for, each with the subjects that are meant (None: all)."""
    meant: dict[str, list[tuple[str, list[str] | None]]] = {}
    for task, settings in known_tasks().items():
        meant[task] = [(task, None)]
        if group := settings.get("group"):
            meant.setdefault(group, []).append((task, None))
        for average, subjects in settings.get("averages", {}).items():
            meant[average] = [(task, subjects)]
            meant |= {f"{task}_{subject}": [(task, [subject])] for subject in subjects}
    if name not in meant:
        raise UserError(f'There is no task "{name}". {nearest(name, meant)}')
    return meant[name]


def measure(
    subject: Subject,
    evaluation: Evaluation,
    device: torch.device,
    to: Path,
    watcher: Watcher | None,
    distributed: Distributed,
) -> EvaluationSummary | None:
    """Ask all questions, of base and of unlearned where there is an adapter, and leave the scores in `to`; go
    on where it was stopped.

    Returns what `summary.json` holds. Of several processes, each asks its share; only the first, which has a
    watcher, writes.
    """
    spec = subject.spec
    spec.check_checkpoint()
    if subject.adapter:
        check_base(subject)
    questions, digest = load_questions(evaluation), spec.digest(device)
    if distributed.is_main_process:
        claim(to, subject.name, subject.digest(digest), evaluation)
    tokenizer = spec.tokenizer
    model: Any = spec.load(device)
    batch_tokens = 0
    if distributed.is_main_process:
        batch_tokens = fixed_batch_tokens(evaluation.batch_tokens, model, tokenizer.pad_token_id, to)
    batch_tokens = distributed.broadcast(batch_tokens)
    if subject.adapter:
        model = load_adapter(model, subject.adapter)
    for side in subject.sides:
        shared = shared_answers(to.parent, digest) if side == "base" else None
        with base_only(model) if side == "base" else nullcontext(), stopped_in(to):
            hear = followed(watcher, side, questions) if watcher else unheard
            evaluated = evaluate_and_keep(
                model,
                tokenizer,
                questions,
                batch_tokens,
                to / f"answers_{side}.jsonl",
                shared,
                hear,
                distributed,
            )
        if distributed.is_main_process:
            write_scores(to, side, evaluated.scores, questions, subject.name)
    return summary(to, subject.name, questions, evaluation.limit) if distributed.is_main_process else None


def check_base(subject: Subject) -> None:
    """Raise UserError where the model that an adapter names cannot be had, and say who named it."""
    try:
        _ = subject.spec.config
    except UserError as error:
        raise UserError(
            f"{error}",
            f"The adapter {subject.adapter} names {subject.spec.name} as its base model.",
        ) from error


def measure_endpoint(
    endpoint: Endpoint, evaluation: Evaluation, to: Path, watcher: Watcher
) -> EvaluationSummary:
    """Return the same of a model behind a server."""
    questions, path, name = (
        load_questions(evaluation),
        to / "answers_base.jsonl",
        f"{endpoint.model} at {endpoint.address}",
    )
    claim(to, name, name, evaluation)
    before = read_lines(path, Answer)
    # Without the line that a kill may have torn, and without damaged ones: they are asked again.
    write_lines(path, before)
    known = {row.prompt: row for row in before}
    with stopped_in(to):
        evaluated = evaluate_endpoint(
            endpoint, questions, known, partial(add_lines, path), followed(watcher, "base", questions)
        )
    write_lines(path, evaluated.answers)
    write_scores(to, "base", evaluated.scores, questions, name)
    return summary(to, name, questions, evaluation.limit)


@dataclass(frozen=True)
class Claimed:
    """The shape of `config.json` in the folder of an evaluation, or of a run."""

    digest: str = ""
    model: str = "a run"
    evaluation: dict[str, Any] = field(default_factory=dict)


def claim(to: Path, name: str, digest: str, evaluation: Evaluation) -> None:
    """Make the folder, or take it up again. Raises UserError where it holds another model's results, or those
    of other questions.
    """
    mine = {"model": name, "digest": digest, "evaluation": evaluation.model_dump()}
    config = to / "config.json"
    if not config.exists():
        if to.exists() and any(to.iterdir()):
            raise UserError(
                f"The folder {to} holds other files.",
                "Give a new folder with --to.",
            )
        make_private(to, exist_ok=True)
        data = sources_record(find_task_sources(evaluation))
        write_json(config, mine | {"data": data, "created": datetime.now(UTC).isoformat(timespec="seconds")})
        return
    there = checked_json(config, Claimed, "Give a new folder with --to.")
    if there.get("digest") != digest:
        raise UserError(
            f"The folder {to} holds results of another model: {there.get('model', 'a run')}.",
            "Give a new folder with --to.",
        )
    if different := sorted(differences(recorded_evaluation(there.get("evaluation", {})), mine["evaluation"])):
        raise UserError(
            f"The folder {to} holds results of other questions: {', '.join(different)} differ.",
            "Give a new folder with --to.",
        )


def write_scores(
    to: Path, side: str, scores: dict[str, Any], questions: list[QuestionSet], name: str
) -> None:
    """Write the scores in our layout, and in that of lm-evaluation-harness for programs that read its
    files.
    """
    write_json(to / f"{side}.json", scores)
    write_json(to / f"harness_{side}.json", harness_results(scores, questions, name, time.time()))


def followed(watcher: Watcher, side: str, questions: list[QuestionSet]) -> Callable[[int, float], bool]:
    watcher.started(f"evaluate-{side}", sum(len(each.questions) for each in questions))

    def hear(done: int, accuracy: float) -> bool:
        watcher.advanced(done, {"accuracy": accuracy})
        return watcher.asks_to_stop()

    return hear


def unheard(done: int, accuracy: float) -> bool:
    return False


@contextmanager
def stopped_in(to: Path) -> Iterator[None]:
    try:
        yield
    except Interrupted as stop:
        raise Stopped(to, f"the same command with {command_line('--to', to)}") from stop


def summary(to: Path, name: str, questions: list[QuestionSet], limit: int | None) -> EvaluationSummary:
    """Return the table of all sides, as a run's `summary.json` has it."""
    base = read_lines(to / "answers_base.jsonl", Answer)
    unlearned = read_lines(to / "answers_unlearned.jsonl", Answer) or None
    rows = compare_tasks(questions, base, unlearned)
    found = EvaluationSummary(name, rows, limit, unasked_subjects(questions))
    write_json(to / "summary.json", asdict(found))
    return found
