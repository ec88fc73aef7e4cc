"""Whether what is exported has forgotten too: it is loaded as others will load it, and asked the run's own
questions.

The rule. Every task is compared question by question: exported against unlearned in the run, by the 95%
interval of the change of its accuracy (`compare.change_interval`). Tasks that sum up subjects count, their
subjects do not.

- A task that the run made the model forget (role `forgotten`, right answers fell significantly by McNemar's
  exact test): at most a quarter of that fall may have come back. *survived*: the whole interval lies within
  that quarter; *came back*: the whole of it lies beyond.
- Any other task that the unlearned model answers better than guessing: at most a quarter of what lies above
  guessing may be lost, in the same way *intact* or *lost*. It is asked because a damaged file has forgotten
  everything, the forget set too.
- *inconclusive*: the interval has the limit within it, there are too few questions. *nothing to tell*: the
  run did not forget the task, or the unlearned model guessed at it.

The mark. *the update did not survive*: a task came back. Else *damaged*: a task was lost. Else *verified*:
every task that was forgotten survived, there is at least one, and at least one other is intact. Else
*inconclusive*. Of several ways to load an export the worst counts.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lowmem_rmu.config.schema import ModelSettings, Preset, Role
from lowmem_rmu.data.questions import QuestionSet, load_questions
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.evaluation.compare import TOLERATED, compare_tasks
from lowmem_rmu.evaluation.kept import fixed_batch_tokens
from lowmem_rmu.evaluation.multiple_choice import Progress, ask, evaluate
from lowmem_rmu.evaluation.statistics import LUCK, by_luck, change_interval
from lowmem_rmu.evaluation.summary import in_todays_words
from lowmem_rmu.export.gguf.llama import ask_llama, is_adapter, llama_is_there
from lowmem_rmu.memory.advice import is_out_of_memory
from lowmem_rmu.memory.estimate import gib, memory_available, plan
from lowmem_rmu.model.adapters import load_adapter
from lowmem_rmu.model.loading import Quantisation
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import read_preset
from lowmem_rmu.runs.records import Answer, checked_json
from lowmem_rmu.weights.shards import give_back_freed_memory

FILE = "verification.json"


Mark = Annotated[
    Literal["the update did not survive", "damaged", "inconclusive", "verified"],
    BeforeValidator(in_todays_words),
]
MARKS: tuple[Mark, ...] = ("the update did not survive", "damaged", "inconclusive", "verified")
"""The worst first."""
Finding = Annotated[
    Literal["survived", "came back", "intact", "lost", "inconclusive", "nothing to tell"],
    BeforeValidator(in_todays_words),
]
Follow = Callable[[str, list[QuestionSet]], Progress]
"""Takes the side that is evaluated next, returns the callback for questions done and accuracy so far, as
`evaluate` has it.
"""


@dataclass(frozen=True)
class Compared:
    """One task: accuracies with their standard errors, as shares."""

    task: str
    role: Role
    questions: int
    base: float
    base_stderr: float
    unlearned: float
    unlearned_stderr: float
    exported: float
    exported_stderr: float
    change: float
    """Exported minus unlearned."""
    change_from: float
    change_to: float
    """Its 95% interval."""
    limit: float | None
    """The change that is tolerated: upwards for what was forgotten, downwards for anything else; None where
    there is nothing to tell.
    """
    p_against_unlearned: float
    p_against_base: float
    """McNemar's exact test of exported against either: small where more than luck parts them."""
    finding: Finding


@dataclass(frozen=True)
class Checked:
    """The export as loaded in one way; `mark` is None where it was not asked, for the `reason`."""

    name: str
    mark: Mark | None
    reason: str | None
    seconds: float
    tasks: tuple[Compared, ...]


@dataclass(frozen=True)
class Verification:
    """What `verification.json` holds."""

    mark: Mark
    checked: tuple[Checked, ...]


@dataclass(frozen=True)
class Run:
    """What the run asked, and what base and unlearned answered there."""

    folder: RunFolder
    preset: Preset
    sets: list[QuestionSet]
    base: list[Answer]
    unlearned: list[Answer]


Ask = Callable[[Run, torch.device, Progress], list[Answer]]
"""Loads an export in some way and asks it all questions."""


def follow_nothing(name: str, sets: list[QuestionSet]) -> Progress:
    return lambda done, accuracy: False


def verify(
    run: RunFolder, artefact: Path, device: torch.device, follow: Follow = follow_nothing
) -> Verification:
    """Ask the export all of the run's questions, one model in memory at a time, and leave `verification.json`
    in its folder.

    Raises UserError where the run has not been measured, or its questions have changed since; `Interrupted`
    where `follow` asks to stop.
    """
    measured = read_run(run)
    ways = ways_to_load(measured.preset, artefact)
    checked = (
        tuple(_check(name, asks, measured, device, follow) for name, asks in ways.items())
        if measured.sets
        else ()
    )
    verification = Verification(worst(each.mark for each in checked), checked)
    write_json(artefact / FILE, asdict(verification))
    return verification


def read_verification(artefact: Path) -> dict[str, Any] | None:
    """Read the `verification.json` of an export, in the words of this version; None where there is none.

    Raises UserError where it is damaged.
    """
    path = artefact / FILE
    if not path.exists():
        return None
    found: dict[str, Any] = checked_json(path, Verification, "Export the run again.")
    found["mark"] = in_todays_words(found["mark"])
    for checked in found["checked"]:
        checked["mark"] = in_todays_words(checked["mark"])
        for task in checked["tasks"]:
            task["finding"] = in_todays_words(task["finding"])
    return found


def read_run(folder: RunFolder) -> Run:
    """Return questions and answers of a run. Raises UserError."""
    preset = read_preset(folder)
    sets = load_questions(preset.evaluation)
    asked = [each.prompt.digest for each in ask(sets)]
    given: dict[str, list[Answer]] = {}
    for side in ("base", "unlearned"):
        if not folder.evaluation(side).exists():
            raise UserError(
                f"Run {folder.path} has not measured {side}, so there is nothing to hold an export against.",
                Fix("Go on with it: {action}", ResumeRun(folder.path.name)),
            )
        given[side] = folder.read_answers(side)
        if [row.prompt for row in given[side]] != asked:
            raise UserError(
                f"The questions of run {folder.path} have changed since it asked {side}.",
                "Put the old ones back, or make the run again.",
            )
    return Run(folder, preset, sets, given["base"], given["unlearned"])


def ways_to_load(preset: Preset, artefact: Path) -> dict[str, Ask]:
    """Return how others will load an adapter, a checkpoint or GGUF files, by name. Raises UserError where the
    folder holds none of these.
    """
    if (artefact / "adapter_config.json").is_file():
        precision = "NF4" if preset.model.quantisation == "nf4" else preset.model.dtype
        return {f"adapter on the base, {precision}": partial(_ask_adapter, artefact)}
    if (artefact / "config.json").is_file():
        spec = ModelSpec(ModelSettings(name=str(artefact.resolve()), device_map=preset.model.device_map))
        own = spec.stored_dtype
        spec = spec.with_precision(dtype=own)
        precisions: dict[str, Quantisation] = {own: "none", "NF4": "nf4", "int8": "int8"}
        return {
            f"merged, {name}": partial(_ask_merged, spec, precision) for name, precision in precisions.items()
        }
    if files := sorted(artefact.glob("*.gguf")):
        return {file.name: partial(_ask_gguf, file) for file in files}
    raise UserError(
        f"{artefact} holds neither an adapter nor a checkpoint nor GGUF files.",
        "Give the folder that was exported to.",
    )


class NotAsked(Exception):
    """Why an export could not be asked in some way."""


def _check(name: str, asks: Ask, run: Run, device: torch.device, follow: Follow) -> Checked:
    began = monotonic()
    try:
        answers = asks(run, device, follow(name, run.sets))
    except NotAsked as reason:
        return Checked(name, None, str(reason), 0.0, ())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Checked(name, None, f"out of memory on {device}", 0.0, ())
    finally:
        gc.collect()  # the next model comes only once this one has gone
        give_back_freed_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tasks = tuple(compare_export(run.sets, run.base, run.unlearned, answers))
    return Checked(name, mark_of(tasks), None, monotonic() - began, tasks)


def _ask_adapter(artefact: Path, run: Run, device: torch.device, progress: Progress) -> list[Answer]:
    """Ask the adapter on the base model, as the run had it."""
    spec = ModelSpec.of_preset(run.preset)
    check_room(run.preset, spec, spec.settings.quantisation, device)
    return _ask(load_adapter(spec.load(device), artefact), spec, run, progress)


def _ask_merged(
    spec: ModelSpec, precision: Quantisation, run: Run, device: torch.device, progress: Progress
) -> list[Answer]:
    check_room(run.preset, spec, precision, device)
    return _ask(spec.load(device, quantisation=precision), spec, run, progress)


def check_room(preset: Preset, spec: ModelSpec, precision: Quantisation, device: torch.device) -> None:
    """Raise NotAsked where the model needs more than the device has: one too large may take the whole machine
    down.
    """
    needed, free = room_needed(preset, spec, precision, device), memory_available(device)
    if needed > free and spec.settings.device_map == "one":
        raise NotAsked(f"it needs {gib(needed)}, but {gib(free)} are free on {device}")


def room_needed(preset: Preset, spec: ModelSpec, precision: Quantisation, device: torch.device) -> int:
    """Return bytes by the memory plan, which knows no 8 bits."""
    if precision == "int8":
        unquantised, nf4 = (room_needed(preset, spec, each, device) for each in ("none", "nf4"))
        # On a CPU bitsandbytes keeps a second copy of every weight, and buffers: SmolLM2 took 1.9 times what
        # it takes in bfloat16.
        return 2 * unquantised if device.type == "cpu" else (unquantised + nf4) // 2
    changed = preset.model_copy(update={"model": spec.with_precision(quantisation=precision).settings})
    return plan(changed, spec, device, ["evaluate-base"])[0].total


def _ask(model: Any, spec: ModelSpec, run: Run, progress: Progress) -> list[Answer]:
    tokenizer = spec.tokenizer
    batch_tokens = fixed_batch_tokens(
        run.preset.evaluation.batch_tokens, model, tokenizer.pad_token_id, run.folder.path / "evaluation"
    )
    return evaluate(model, tokenizer, run.sets, batch_tokens, progress=progress).answers


def _ask_gguf(file: Path, run: Run, device: torch.device, progress: Progress) -> list[Answer]:
    """By llama.cpp, wherever that runs."""
    if is_adapter(file):
        raise NotAsked("an adapter alone, which llama.cpp puts on the base's own GGUF file")
    if not llama_is_there():
        raise NotAsked("llama.cpp is not installed: pip install llama-cpp-python")
    return ask_llama(file, run.sets, progress)


def compare_export(
    sets: list[QuestionSet], base: list[Answer], unlearned: list[Answer], exported: list[Answer]
) -> Iterator[Compared]:
    """Compare each task as a whole, by the rule above."""
    in_run, moved, from_base = (
        [asdict(row) for row in compare_tasks(sets, *pair)]
        for pair in ((base, unlearned), (unlearned, exported), (base, exported))
    )
    for run_row, row, base_row in zip(in_run, moved, from_base, strict=True):
        if row["group"] is None and not row["is_average"]:
            yield _compared(run_row, row, base_row)


def _compared(in_run: dict[str, Any], moved: dict[str, Any], from_base: dict[str, Any]) -> Compared:
    """Return rows of `compare_tasks`: base and unlearned, unlearned and exported, base and exported."""
    low, high = change_interval(moved["lost"], moved["gained"], moved["questions"])
    limit = tolerated(in_run)
    return Compared(
        task=moved["task"],
        role=moved["role"],
        questions=moved["questions"],
        base=in_run["base"],
        base_stderr=in_run["base_stderr"],
        unlearned=in_run["unlearned"],
        unlearned_stderr=in_run["unlearned_stderr"],
        exported=moved["unlearned"],
        exported_stderr=moved["unlearned_stderr"],
        change=moved["change"],
        change_from=low,
        change_to=high,
        limit=limit,
        p_against_unlearned=moved["p_value"],
        p_against_base=from_base["p_value"],
        finding=_finding(moved["role"], limit, low, high),
    )


def tolerated(in_run: dict[str, Any]) -> float | None:
    """Return the change that an export of this task may show: upwards where it was forgotten, else downwards;
    None where there is nothing to tell.
    """
    if in_run["role"] == "forgotten":
        fell = in_run["change"] < 0 and in_run["p_value"] < LUCK
        return TOLERATED * -in_run["change"] if fell else None
    guesses = in_run["unlearned"] <= by_luck(in_run["chance"], in_run["questions"])
    return None if guesses else TOLERATED * (in_run["chance"] - in_run["unlearned"])


def _finding(role: Role, limit: float | None, low: float, high: float) -> Finding:
    if limit is None:
        return "nothing to tell"
    if role == "forgotten":
        return "survived" if high <= limit else "came back" if low > limit else "inconclusive"
    return "intact" if low >= limit else "lost" if high < limit else "inconclusive"


def mark_of(tasks: Iterable[Compared]) -> Mark:
    """Return the mark of one way to load an export, by what its tasks say."""
    findings = {True: set[Finding](), False: set[Finding]()}
    for each in tasks:
        findings[each.role == "forgotten"].add(each.finding)
    forgotten, others = findings[True] - {"nothing to tell"}, findings[False]
    if "came back" in forgotten:
        return "the update did not survive"
    if "lost" in others:
        return "damaged"
    return "verified" if forgotten == {"survived"} and "intact" in others else "inconclusive"


def worst(marks: Iterable[Mark | None]) -> Mark:
    """Return the worst mark of several ways to load an export; inconclusive where it was asked in none."""
    return min((mark for mark in marks if mark), key=MARKS.index, default="inconclusive")


def verification_tables(verification: Verification) -> Group:
    """Make the tables for a terminal of 80 columns: one per way to load the export, and the mark."""
    why = "" if verification.checked else " (the run asked no questions)"
    return Group(
        *(_table(each) for each in verification.checked),
        Text(f"The export: {verification.mark}{why}", style="bold"),
    )


def _table(checked: Checked) -> Table | Text:
    """Return accuracies in percent with their standard errors."""
    if checked.mark is None:
        return Text(f"{checked.name}: not asked: {checked.reason}\n")
    title = Text(f"{checked.name}: {checked.mark}")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("Task", "Base", "Unlearned", "Exported", "Change (95%)", "Found"):
        table.add_column(
            column,
            justify="left" if column in ("Task", "Found") else "right",
            no_wrap=column != "Task",
            overflow="fold",
        )
    for task in checked.tasks:
        sides = (
            (task.base, task.base_stderr),
            (task.unlearned, task.unlearned_stderr),
            (task.exported, task.exported_stderr),
        )
        cells = [f"{100 * share:.1f} ± {100 * stderr:.1f}" for share, stderr in sides]
        interval = f"{100 * task.change_from:+.1f} to {100 * task.change_to:+.1f}"
        table.add_row(Text(task.task), *cells, interval, task.finding)
    return table
