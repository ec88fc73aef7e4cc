"""`python -m lowmem_rmu evaluate`: any model, adapter or run on any tasks, into a folder of its own."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowmem_rmu.data.questions import QuestionSet, load_questions
from lowmem_rmu.errors import UserError, nearest
from lowmem_rmu.evaluation.compare import compare_tasks, rows_as_json
from lowmem_rmu.evaluation.endpoint import Endpoint, evaluate_endpoint
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.kept import evaluate_and_keep, fixed_batch_tokens, shared_answers
from lowmem_rmu.evaluation.multiple_choice import Interrupted
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.identity import content_digest, model_digest
from lowmem_rmu.model.loading import load_model, load_tokenizer, unquantised_modules
from lowmem_rmu.presets import Evaluation, ModelSettings, differences, is_local, known_tasks, override, recorded_preset, resolve_paths, short_name
from lowmem_rmu.processes import Processes
from lowmem_rmu.runs import RunFolder, Stopped, Watcher, add_lines, read_lines, write_json, write_lines


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, and an adapter on it where there is one."""

    model: ModelSettings
    adapter: Path | None = None
    unquantised: tuple[str, ...] = ()

    @property
    def sides(self) -> list[str]:
        return ["base", "unlearned"] if self.adapter else ["base"]

    @property
    def name(self) -> str:
        return f"{short_name(self.model.name)} with {short_name(str(self.adapter.resolve()))}" if self.adapter else short_name(self.model.name)

    @property
    def file_name(self) -> str:
        return as_file_name(Path(self.adapter.resolve().parent if self.adapter else self.model.name).name)

    def digest(self, base: str) -> str:
        """Of the model's digest and the adapter's."""
        return f"{base}+{content_digest(self.adapter / 'adapter_model.safetensors')[:24]}" if self.adapter else base


def as_file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", model)


def find_subject(name: str, quantisation: str | None = None, dtype: str | None = None) -> Subject:
    """A run's folder, an adapter's, a model's, or a Hub id. What is given of the precision overrides what a run says."""
    path, precision = Path(name).expanduser(), {key: value for key, value in (("quantisation", quantisation), ("dtype", dtype)) if value}
    if (path / "adapter_config.json").is_file():
        adapted = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        settings = ModelSettings.model_validate({"name": adapted["base_model_name_or_path"], "revision": adapted.get("revision")} | precision)
        return Subject(settings, path, tuple(adapted.get("modules_to_save") or ()))
    if (path / "config.json").is_file() and "settings" in json.loads((path / "config.json").read_text(encoding="utf-8")):
        folder = RunFolder(path)
        preset = recorded_preset(folder.config["settings"], path)
        settings = preset.model.model_copy(update=precision)
        return Subject(settings, folder.adapter if folder.adapter.exists() else None, tuple(unquantised_modules(preset)))
    local = str(path.resolve()) if path.exists() else name
    return Subject(ModelSettings.model_validate({"name": local} | precision))


def choose_tasks(names: str, num_fewshot: int | None, changes: list[str], limit: int | None, batch_tokens: int | str) -> Evaluation:
    """What `--tasks` names: tasks of `tasks.yaml`, a group of them (`wmdp`), an average (`mmlu_stem`), a subject (`mmlu_virology`), or the
    path of own questions.

    `changes` are `TASK.KEY=VALUE`. Raises UserError.
    """
    tasks: dict[str, dict[str, Any]] = {}
    named = [name.strip() for name in names.split(",") if name.strip()]
    tasks |= {Path(name).stem: {"source": name, "role": "measured"} for name in named if is_local(name)}
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
        lines = [f"  {'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors()]
        raise UserError("The tasks cannot be asked so:\n" + "\n".join(lines)) from error


def _named(name: str) -> list[tuple[str, list[str] | None]]:
    """The known tasks that a name stands for, each with the subjects that are meant (None: all)."""
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
    subject: Subject, evaluation: Evaluation, device: torch.device, to: Path, watcher: Watcher | None, processes: Processes
) -> dict[str, Any]:
    """Asks all questions, of base and of unlearned where there is an adapter, and leaves the scores in `to`; goes on where it was stopped.

    Gives what `summary.json` holds. Of several processes, each asks its share; only the first, which has a watcher, writes.
    """
    questions, digest = load_questions(evaluation), model_digest(subject.model, device, subject.unquantised)
    if processes.is_first:
        claim(to, subject.name, subject.digest(digest), evaluation)
    tokenizer = load_tokenizer(subject.model)
    model: Any = load_model(subject.model, device, unquantised=subject.unquantised)
    batch_tokens = processes.from_first(fixed_batch_tokens(evaluation.batch_tokens, model, tokenizer.pad_token_id, to) if processes.is_first else 0)
    if subject.adapter:
        model = load_adapter(model, subject.adapter)
    for side in subject.sides:
        shared = shared_answers(to.parent, digest) if side == "base" else None
        with base_only(model) if side == "base" else nullcontext(), stopped_in(to):
            hear = followed(watcher, side, questions) if watcher else unheard
            evaluated = evaluate_and_keep(model, tokenizer, questions, batch_tokens, to / f"answers_{side}.jsonl", shared, hear, processes)
        if processes.is_first:
            write_scores(to, side, evaluated.scores, questions, subject.name)
    return summary(to, subject.name, questions, evaluation.limit) if processes.is_first else {}


def measure_endpoint(endpoint: Endpoint, evaluation: Evaluation, to: Path, watcher: Watcher) -> dict[str, Any]:
    """The same of a model behind a server."""
    questions, path, name = load_questions(evaluation), to / "answers_base.jsonl", f"{endpoint.model} at {endpoint.address}"
    claim(to, name, name, evaluation)
    before = read_lines(path)
    write_lines(path, before)  # without the line that a kill may have torn
    known = {row["prompt"]: row for row in before}
    with stopped_in(to):
        evaluated = evaluate_endpoint(endpoint, questions, known, partial(add_lines, path), followed(watcher, "base", questions))
    write_lines(path, evaluated.answers)
    write_scores(to, "base", evaluated.scores, questions, name)
    return summary(to, name, questions, evaluation.limit)


def claim(to: Path, name: str, digest: str, evaluation: Evaluation) -> None:
    """Makes the folder, or takes it up again. Raises UserError where it holds another model's results, or those of other questions."""
    mine = {"model": name, "digest": digest, "evaluation": evaluation.model_dump()}
    config = to / "config.json"
    if not config.exists():
        if to.exists() and any(to.iterdir()):
            raise UserError(f"The folder {to} holds other files.\nGive a new folder with --to.")
        to.mkdir(parents=True, exist_ok=True)
        write_json(config, mine | {"created": datetime.now(UTC).isoformat(timespec="seconds")})
        return
    there = json.loads(config.read_text(encoding="utf-8"))
    if there.get("digest") != digest:
        raise UserError(f"The folder {to} holds results of another model: {there.get('model', 'a run')}.\nGive a new folder with --to.")
    if different := sorted(differences(there["evaluation"], mine["evaluation"])):
        raise UserError(f"The folder {to} holds results of other questions: {', '.join(different)} differ.\nGive a new folder with --to.")


def write_scores(to: Path, side: str, scores: dict[str, Any], questions: list[QuestionSet], name: str) -> None:
    """In our layout, and in that of lm-evaluation-harness for what reads its files."""
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
        raise Stopped(to, f"the same command with --to {to}") from stop


def summary(to: Path, name: str, questions: list[QuestionSet], limit: int | None) -> dict[str, Any]:
    """The table of all sides, as a run's `summary.json` has it."""
    base, unlearned = (read_lines(to / f"answers_{side}.jsonl") or None for side in ("base", "unlearned"))
    rows = rows_as_json(compare_tasks(questions, base or [], unlearned))
    content = {"model": name, "rows": rows, "limit": limit}
    write_json(to / "summary.json", content)
    return content
