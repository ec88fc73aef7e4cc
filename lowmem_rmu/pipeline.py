"""The stages in order: evaluate base -> unlearn -> evaluate unlearned -> report. The command line and the app both run this."""

import gc
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import machine, processor, python_version
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lowmem_rmu import __version__
from lowmem_rmu.chat import Sampling, answer
from lowmem_rmu.data.corpora import GUARDED, FormShares, Samples, load_samples, mix, spread
from lowmem_rmu.data.questions import LETTERS, QuestionSet, load_questions, unasked_subjects
from lowmem_rmu.data.sources import Sources, corpora_of, find_sources, sources_record
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.errors import UserError, is_disk_full
from lowmem_rmu.evaluation.compare import compare_tasks, compare_texts, rows_as_json, verdict
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.kept import evaluate_and_keep, fixed_batch_tokens, shared_answers
from lowmem_rmu.evaluation.known import perplexity_of, unknown_topic, unlike_texts
from lowmem_rmu.evaluation.multiple_choice import Interrupted, evaluate
from lowmem_rmu.evaluation.perplexity import divergence, text_loss
from lowmem_rmu.evaluation.summary import audit_mark
from lowmem_rmu.model.adapters import add_adapter, base_only, load_adapter, save_adapter
from lowmem_rmu.model.changes import adapted_digests
from lowmem_rmu.model.fit import is_out_of_memory, out_of_memory
from lowmem_rmu.model.identity import model_digest
from lowmem_rmu.model.loading import (
    check_checkpoint,
    describe_weights,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
    unquantised_modules,
)
from lowmem_rmu.model.memory import memory_in_use, reset_peak
from lowmem_rmu.model.saved import adapter_digests
from lowmem_rmu.model.shards import give_back_freed_memory
from lowmem_rmu.model.source import commit_of
from lowmem_rmu.presets import Preset, Role, short_name
from lowmem_rmu.processes import Processes
from lowmem_rmu.records import DIGESTS
from lowmem_rmu.report import write_report
from lowmem_rmu.runs import (
    RunFolder,
    Stopped,
    Watcher,
    folder_replaced,
    remove_leftovers,
    write_json,
    write_lines,
)
from lowmem_rmu.unlearning.guard import GuardData, Kind
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData
from lowmem_rmu.unlearning.steering import cues

SIDE_OF = {"evaluate-base": "base", "evaluate-unlearned": "unlearned"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")
HEARTBEAT_SECONDS = 1.0
NO_TEXT_FOR_THE_GUARD = (
    "Training went unguarded: a corpus is too short to put text aside for the guard. Nobody looked whether the rest was kept while it trained."
)
TARGET_LAYER_ALONE = (
    "The guard measured the output of the target layer, not predictions: nothing is evaluated, so that no layer above it was loaded."
)
NO_MORE: Any = ()
"""What the first process tells the others when there is nothing left to evaluate."""


@dataclass(frozen=True)
class Inputs:
    """All that a run reads besides the model: read before anything is computed, so that mistakes show at once."""

    tokenizer: PreTrainedTokenizerBase
    questions: list[QuestionSet]
    forget: dict[str, Samples]
    retain: Samples
    sources: Sources = field(default_factory=dict)
    """The local files that all of it came from."""

    @property
    def texts(self) -> dict[str, list[list[int]]]:
        """Held-out token sequences by name, where the preset holds any out."""
        texts = {name: samples.held_out for name, samples in self.forget.items()} | {"retain": self.retain.held_out}
        return {name: sequences for name, sequences in texts.items() if sequences}

    @property
    def text_bytes(self) -> dict[str, list[int]]:
        """Of those sequences, the bytes that are predicted."""
        return {name: samples.held_out_bytes for name, samples in self.forget.items()} | {"retain": self.retain.held_out_bytes}

    @property
    def text_roles(self) -> dict[str, Role]:
        return {name: "forgotten" if name in self.forget else "kept" for name in self.texts}


def read_inputs(preset: Preset, stages: list[str]) -> Inputs:
    """Checks the model's shape and reads every question and corpus. Raises UserError."""
    config = load_config(preset.model)
    add_adapter(skeleton(config), preset.rmu, preset.model)  # on a model without weights: whatever is wrong with it shows now
    evaluates = any(stage in SIDE_OF for stage in stages)
    check_checkpoint(preset.model, None if evaluates else preset.rmu.target_layer + 1)
    tokenizer = load_tokenizer(preset.model)
    questions = load_questions(preset.evaluation)
    sources = find_sources(preset, needs_text(preset, stages))
    if not needs_text(preset, stages):
        return Inputs(tokenizer, questions, {}, Samples([], []), sources)
    guards = preset.rmu.guard_every > 0
    forget = {
        name: load_samples(topic.corpus, tokenizer, topic.max_tokens, FormShares(topic.questions), guards)
        for name, topic in preset.topics.items()
    }
    shares = FormShares(preset.retain.questions, preset.retain.chat)
    retained = [load_samples(corpus, tokenizer, preset.retain.max_tokens, shares, guards) for corpus in preset.retain.corpora]
    retain = Samples(
        train=mix([part.train for part in retained], [corpus.share for corpus in preset.retain.corpora]),
        held_out=sum((part.held_out for part in retained), []),
        held_out_bytes=sum((part.held_out_bytes for part in retained), []),
        prompts=spread(sum((part.prompts for part in retained), []), GUARDED),
        guarded=spread(sum((part.guarded for part in retained), []), GUARDED),
    )
    rmu = preset.rmu
    for name, samples, needed in [
        *((f"topics.{name}", samples, rmu.batch_size) for name, samples in forget.items()),
        ("retain", retain, rmu.retain_batch_size or rmu.batch_size),
    ]:
        if len(samples.train) < needed:
            raise UserError(
                f"The corpus of {name} gives {len(samples.train)} samples, fewer than one batch of {needed}.\nAdd text, or lower rmu.batch_size."
            )
    return Inputs(tokenizer, questions, forget, retain, sources)


def needs_text(preset: Preset, stages: list[str]) -> bool:
    """Whether the stages read the preset's corpora: to train on them, or to measure what is held out."""
    return "unlearn" in stages or any(corpus.held_out for corpus in corpora_of(preset).values())


def run_config(
    name: str, preset: Preset, device: torch.device, sources: Sources | None = None
) -> dict[str, Any]:
    """What `config.json` holds: everything that decides the run, where it ran, and the files it read."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor() or machine()}, {os.cpu_count()} cores"
    return {
        "preset": name,
        "settings": preset.model_dump(),
        "data": sources_record(sources or {}),
        "versions": {"python": python_version(), "lowmem-rmu": __version__} | {package: version(package) for package in PACKAGES},
        "device": device.type,
        "device_name": device_name,
        "seed": preset.rmu.seed,
        "model_revision": commit_of(preset.model.name, preset.model.revision) or preset.model.revision,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def help_evaluate(preset: Preset, inputs: Inputs, device: torch.device, processes: Processes) -> None:
    """What all processes but the first do: their share of the questions whenever the first one evaluates, until it is done."""
    model: Any = load_model(preset.model, device, None, unquantised_modules(preset)) if inputs.questions else None
    while (order := processes.from_first(NO_MORE)) != NO_MORE:
        side, batch_tokens, adapter = order
        if side == "unlearned":
            with TemporaryDirectory() as folder:
                for name, content in adapter.items():
                    (Path(folder) / name).write_bytes(content)
                model = load_adapter(model, Path(folder))
        with base_only(model) if side == "base" else nullcontext(), suppress(Interrupted):
            evaluate(model, inputs.tokenizer, inputs.questions, batch_tokens, processes=processes)


def guard_data(inputs: Inputs) -> GuardData | None:
    """Return what the guard looks at, or None where a corpus is too small to put anything aside."""
    kinds = {name: Kind(samples.guarded, samples.prompts) for name, samples in inputs.forget.items()}
    retain = Kind(inputs.retain.guarded, inputs.retain.prompts)
    if not all(kind.texts for kind in [retain, *kinds.values()]):
        return None
    letters = inputs.tokenizer([f" {letter}" for letter in LETTERS], add_special_tokens=False)["input_ids"]
    return GuardData(retain, kinds, [ids[-1] for ids in letters])


def is_done(folder: RunFolder, stage: str) -> bool:
    """Whether a run need not go through the stage again."""
    if stage in SIDE_OF:
        return folder.evaluation(SIDE_OF[stage]).exists()
    return stage == "unlearn" and folder.adapter.exists()


@dataclass
class Job:
    """One run: `run` goes through `stages`, skipping those that the folder shows to be done."""

    preset: Preset
    folder: RunFolder
    inputs: Inputs
    device: torch.device
    stages: list[str]
    watcher: Watcher
    processes: Processes = field(default_factory=Processes)
    _is_whole: bool = True
    """Whether every layer of the model is loaded."""
    _model: Any = None  # a PreTrainedModel, and a PeftModel once it has an adapter
    _stage: str = "prepare"
    _step: int = 0
    _total: int = 0
    _beat: float = 0.0
    _began: float | None = None
    _stage_peak: int = 0

    def run(self) -> None:
        """Raises UserError for what the user can mend, Stopped when asked to stop; `status.json` tells the same."""
        try:
            with self._translated_errors():
                self._tidy()
                for stage in self.stages:
                    if not is_done(self.folder, stage):
                        self._run_stage(stage)
        except (Stopped, KeyboardInterrupt) as stop:
            self._write_status("stopped")
            if isinstance(stop, Stopped):
                self.processes.from_first(NO_MORE)
            raise
        except BaseException as error:
            self._give_up(error)
            raise
        self._write_status("done")
        self.processes.from_first(NO_MORE)

    def _tidy(self) -> None:
        """Remove what a killed process left: unfinished files, and the cache of a complete training."""
        for folder in (self.folder.path, self.folder.path / "evaluation", self.folder.checkpoint):
            remove_leftovers(folder)
        if is_done(self.folder, "unlearn"):
            shutil.rmtree(self.folder.cache, ignore_errors=True)

    def _run_stage(self, stage: str) -> None:
        """Go through a stage. The file that marks it as done is written last."""
        self._start(stage, 0)
        give_back_freed_memory()  # what an earlier stage has freed, or its peak would be this one's
        reset_peak(self.device)
        if stage == "report":
            self._report()
            return
        self._ensure_model(stage)
        if stage == "unlearn":
            with self._costed(stage):
                self._unlearn()
            self._save_adapter()
        else:
            side = SIDE_OF[stage]
            with self._costed(stage):
                scores = self._evaluate(side)
            write_json(self.folder.evaluation(side), scores)

    @contextmanager
    def _costed(self, stage: str) -> Iterator[None]:
        """Note time and peak memory of a stage, also of one that is stopped."""
        started, self._stage_peak = time.monotonic(), 0
        try:
            yield
        finally:
            self._note_cost(stage, time.monotonic() - started)

    def _evaluate(self, side: str) -> dict[str, Any]:
        """Ask all questions and measure all texts. Returns what `evaluation/base.json` holds."""
        texts, prompts, pad_id = self.inputs.texts, self.preset.evaluation.prompts, self.inputs.tokenizer.pad_token_id
        with base_only(self._model) if side == "base" else nullcontext():
            batch_tokens = fixed_batch_tokens(self.preset.evaluation.batch_tokens, self._model, pad_id, self.folder.path / "evaluation")
            scores = self._ask(side, batch_tokens)
            written = self.inputs.text_bytes
            scores["texts"] = {
                name: text_loss(self._model, self.inputs.tokenizer, each, batch_tokens, written[name]) for name, each in texts.items()
            }
            scores["samples"] = [{"prompt": prompt, "answer": self._answer(prompt)} for prompt in prompts]
        if side == "unlearned" and "retain" in texts:
            scores["texts"]["retain"] |= divergence(self._model, self.inputs.tokenizer, texts["retain"], batch_tokens)
        if questions := self.inputs.questions:
            results = harness_results(scores, questions, short_name(self.preset.model.name), time.time())
            write_json(self.folder.evaluation(side).with_name(f"harness_{side}.json"), results)
        return scores

    def _ask(self, side: str, batch_tokens: int) -> dict[str, Any]:
        """The scores of all questions, with the help of the other processes."""
        questions, path = self.inputs.questions, self.folder.answers(side)
        if not questions:
            write_lines(path, [])
            return {"tasks": {}, "groups": {}, "seconds": 0.0, "questions_per_second": 0.0}
        self._start(self._stage, sum(len(each.questions) for each in questions))
        if self.processes.count > 1:
            adapter = {file.name: file.read_bytes() for file in self.folder.adapter.iterdir()} if side == "unlearned" else {}
            self.processes.from_first((side, batch_tokens, adapter))
        shared = None
        if side == "base":
            digest = model_digest(self.preset.model, self.device, unquantised_modules(self.preset))
            shared = shared_answers(self.folder.path.parent, digest)
        tokenizer = self.inputs.tokenizer
        try:
            return evaluate_and_keep(self._model, tokenizer, questions, batch_tokens, path, shared, self._on_answers, self.processes).scores
        except Interrupted as stop:
            raise Stopped(self.folder.path) from stop

    def _answer(self, prompt: str) -> str:
        sampling = Sampling(max_new_tokens=self.preset.evaluation.max_new_tokens)
        return answer(self._model, self.inputs.tokenizer, [{"role": "user", "content": prompt}], sampling)

    def _unlearn(self) -> None:
        rmu = self.preset.rmu
        self._start("unlearn", rmu.steps)
        self._note("topic", self._look_at_scores())
        tokenizer, forget = self.inputs.tokenizer, self.inputs.forget
        cued = {name: encode_texts(tokenizer, cues(name, topic)) for name, topic in self.preset.topics.items()}
        data = TrainingData(
            forget={name: samples.train for name, samples in forget.items()},
            retain=self.inputs.retain.train,
            pad_id=tokenizer.pad_token_id,
            cues=cued,
            guard=guard_data(self.inputs),
            is_whole=self._is_whole,
        )
        if rmu.guard_every and data.guard is None:
            self._note("guard", [NO_TEXT_FOR_THE_GUARD])
        if not isinstance(self._model, PeftModel):
            self._model = add_adapter(self._model, rmu, self.preset.model)
        if data.guard is not None and data.is_whole:
            self._note("texts", self._look_at_texts(data.guard))
        unlearning = Trainer(self._model, rmu, self.preset.topics, data, self.folder.cache)
        unlearning.restore(self.folder.checkpoint)
        self.folder.truncate_metrics(unlearning.progress.step)
        if not unlearning.run(self.folder.checkpoint, self._on_step, self._asked_to_stop):
            raise Stopped(self.folder.path)
        if unlearning.outcome:
            self._note("guard", [unlearning.outcome] + ([] if data.is_whole else [TARGET_LAYER_ALONE]))

    def _look_at_scores(self) -> list[str]:
        """Return what base's answers say about the topic before it is trained on."""
        scores = self.folder.read_evaluation("base")
        sentence = unknown_topic(scores["tasks"], self.inputs.questions) if scores else None
        return [sentence] if sentence else []

    def _look_at_texts(self, looked_at: GuardData) -> list[str]:
        """Return what base's perplexities say about the texts of forget and retain set."""
        tokenizer, batch_tokens = self.inputs.tokenizer, self.preset.evaluation.planned_batch_tokens
        with base_only(self._model):
            retain = perplexity_of(self._model, tokenizer, looked_at.retain.texts, batch_tokens)
            topics = {name: perplexity_of(self._model, tokenizer, kind.texts, batch_tokens) for name, kind in looked_at.topics.items()}
        return unlike_texts(topics, retain)

    def _note(self, part: str, sentences: list[str]) -> None:
        """Keep what was noticed, and tell the watcher."""
        if sentences or part in self.folder.read_notes():
            self.folder.note(part, sentences)
        for sentence in sentences:
            self.watcher.noted(sentence)

    def _save_adapter(self) -> None:
        with folder_replaced(self.folder.adapter) as new:
            save_adapter(self._model, new)
            write_json(self.folder.path / DIGESTS, adapter_digests(new))
            with suppress(UserError):  # a checkpoint that cannot be merged into is no reason to lose the adapter
                digests = adapted_digests(new, self.preset.model, self.preset.rmu.target_layer + 1)
                write_json(self.folder.matrices, digests)
        shutil.rmtree(self.folder.cache, ignore_errors=True)

    def _report(self) -> None:
        base, unlearned = self.folder.read_evaluation("base"), self.folder.read_evaluation("unlearned")
        if base is None:
            raise UserError(f"{self.folder.path} holds no measurement of the base model to report on.\nAdd evaluate-base to --stages.")
        after = self.folder.read_answers("unlearned") if unlearned else None
        rows = compare_tasks(self.inputs.questions, self.folder.read_answers("base"), after)
        texts = compare_texts(self.inputs.text_roles, base["texts"], unlearned and unlearned["texts"])
        answers = {sample["prompt"]: sample["answer"] for sample in unlearned["samples"]} if unlearned else {}
        summary = {
            "preset": self.folder.config["preset"],
            "title": self.preset.title,
            "model": short_name(self.preset.model.name),
            "verdict": verdict(rows, texts),
            "audit": audit_mark(self.folder),
            "rows": rows_as_json(rows),
            "texts": texts,
            "samples": [{"prompt": each["prompt"], "base": each["answer"], "unlearned": answers.get(each["prompt"])} for each in base["samples"]],
            "stages": self.folder.read_stages(),
            "limit": self.preset.evaluation.limit,
            "notes": [sentence for sentences in self.folder.read_notes().values() for sentence in sentences],
            "unasked": unasked_subjects(self.inputs.questions),
        }
        write_json(self.folder.path / "summary.json", summary)
        write_report(self.folder)

    def _ensure_model(self, stage: str) -> None:
        """Loads what the remaining stages need: every layer if one of them evaluates, else only those up to the target layer."""
        if self._model is None:
            evaluates = any(other in SIDE_OF and not is_done(self.folder, other) for other in self.stages)
            layers = None if evaluates else self.preset.rmu.target_layer + 1
            self._is_whole = layers is None
            self._model = load_model(self.preset.model, self.device, layers, unquantised_modules(self.preset))
            write_json(self.folder.path / "weights.json", describe_weights(self._model))
        if stage == "evaluate-unlearned" and not isinstance(self._model, PeftModel):  # trained by an earlier process
            self._model = load_adapter(self._model, self.folder.adapter)

    def _on_answers(self, done: int, accuracy: float) -> bool:
        self._advance(done, {"accuracy": accuracy})
        return self._asked_to_stop()

    def _on_step(self, row: dict[str, Any]) -> None:
        self._stage_peak = max(self._stage_peak, row["peak_memory_bytes"])
        self.folder.add_metrics(row)
        self._advance(row["step"], {key: row[key] for key in ("topic", "forget_loss", "retain_loss")})

    def _asked_to_stop(self) -> bool:
        return self.watcher.asks_to_stop() or self.folder.stop_asked

    def _start(self, stage: str, total: int) -> None:
        self._stage, self._step, self._total, self._began = stage, 0, total, time.time()
        self.watcher.started(stage, total)
        self._write_status("running")

    def _advance(self, done: int, figures: dict[str, float | str]) -> None:
        self._step = done
        self._stage_peak = max(self._stage_peak, memory_in_use(self.device))
        self.watcher.advanced(done, figures)
        if time.time() - self._beat > HEARTBEAT_SECONDS:
            self._write_status("running")

    def _write_status(self, state: str, error: str | None = None) -> None:
        self._beat = time.time()
        self.folder.write_status(self._stage, self._step, self._total, state, error, self._began)

    def _note_cost(self, stage: str, seconds: float) -> None:
        """Adds to the stage's time, so that a resumed stage counts as a whole."""
        stages = {each["stage"]: each for each in self.folder.read_stages()}
        before = stages.get(stage, {"seconds": 0.0, "peak_memory_bytes": 0})
        peak = max(before["peak_memory_bytes"], self._stage_peak, memory_in_use(self.device))
        stages[stage] = {"stage": stage, "seconds": before["seconds"] + seconds, "peak_memory_bytes": peak}
        write_json(self.folder.path / "stages.json", list(stages.values()))

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
                raise out_of_memory(self.preset, self.device, self.stages, self._stage) from error
            if is_disk_full(error):
                raise UserError(
                    f"The disk that holds {self.folder.path} is full.\nMake room, then go on with --resume --name {self.folder.path.name}."
                ) from error
            raise

    def _give_up(self, error: BaseException) -> None:
        """A run that failed before it measured anything leaves nothing behind; any other keeps what it has."""
        self._model = None
        gc.collect()
        if isinstance(error, UserError) and not self.folder.has_results and not self.folder.output.exists():
            with suppress(OSError):
                self.folder.remove()
        else:
            with suppress(OSError):  # a full disk must not hide why the run failed
                self._write_status("failed", str(error))

