"""The stages of a run: evaluate base -> unlearn -> evaluate unlearned -> report. The command line and the app
both run this.

Each stage is a function over one `RunContext`. A stage is done once the file that marks it exists, which is
written last, so that a run can be stopped or killed anywhere and resumed.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from platform import machine, processor, python_version
from typing import Any

import torch
from peft import PeftModel

from lowmem_rmu import __version__
from lowmem_rmu.chat.conversation import Sampling
from lowmem_rmu.chat.generation import answer
from lowmem_rmu.config.paths import short_name
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.data.questions import unasked_subjects
from lowmem_rmu.data.sources import Sources, sources_record
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.errors import Fix, ResumeRun, UserError, is_disk_full
from lowmem_rmu.evaluation.compare import compare_tasks, compare_texts, verdict
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.kept import evaluate_and_keep, fixed_batch_tokens, shared_answers
from lowmem_rmu.evaluation.known import perplexity_of, unknown_topic, unlike_texts
from lowmem_rmu.evaluation.multiple_choice import Interrupted
from lowmem_rmu.evaluation.perplexity import divergence, text_loss
from lowmem_rmu.evaluation.summary import BothAnswers, Summary, audit_mark
from lowmem_rmu.evaluation.workers import announce, dismiss
from lowmem_rmu.inputs import SIDE_OF, Inputs
from lowmem_rmu.memory.advice import is_out_of_memory, out_of_memory
from lowmem_rmu.memory.estimate import memory_in_use, reset_peak
from lowmem_rmu.model.adapters import add_adapter, base_only, load_adapter, save_adapter
from lowmem_rmu.model.changes import adapted_digests
from lowmem_rmu.model.loading import describe_weights
from lowmem_rmu.model.saved import adapter_digests
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.report.html import write_report
from lowmem_rmu.runs.files import folder_replaced, remove_leftovers, write_json, write_lines
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import DIGESTS, StageCost, as_json
from lowmem_rmu.runs.status import StatusWriter, Stopped
from lowmem_rmu.unlearning.guard import GuardData
from lowmem_rmu.unlearning.trainer import Trainer
from lowmem_rmu.weights.shards import give_back_freed_memory
from lowmem_rmu.weights.source import commit_of

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)
NO_TEXT_FOR_THE_GUARD = (
    "Training went unguarded: a corpus is too short to put text aside for the guard. Nobody looked "
    "whether the rest was kept while it trained."
)
TARGET_LAYER_ALONE = (
    "The guard measured the output of the target layer, not predictions: nothing is evaluated, so that no "
    "layer above it was loaded."
)


@dataclass
class RunContext:
    """What the stages of a run share. `model` is loaded by the first stage that needs it, and keeps its
    adapter once it has one.
    """

    preset: Preset
    spec: ModelSpec
    """The preset's model."""
    folder: RunFolder
    inputs: Inputs
    device: torch.device
    stages: list[str]
    status: StatusWriter
    distributed: Distributed = field(default_factory=Distributed)
    model: Any = None
    """A PreTrainedModel, or a PeftModel once it has an adapter."""
    is_whole: bool = True
    """Whether every layer of the model is loaded."""
    stage_peak: int = 0
    """Largest number of bytes in use that was seen in the current stage."""

    def note(self, part: str, sentences: list[str]) -> None:
        """Keep remarks on a part of the run in its `notes.json`, and show them."""
        if sentences or part in self.folder.read_notes():
            self.folder.note(part, sentences)
        for sentence in sentences:
            self.status.noted(sentence)

    def advance(self, done: int, figures: dict[str, float | str]) -> None:
        """Report the progress of the current stage."""
        self.stage_peak = max(self.stage_peak, memory_in_use(self.device))
        self.status.advanced(done, figures)


def run_config(
    name: str, preset: Preset, device: torch.device, sources: Sources | None = None
) -> dict[str, Any]:
    """Return the content of `config.json`: everything that decides the run, where it ran, and the files it
    read.
    """
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = f"{processor() or machine()}, {os.cpu_count()} cores"
    versions = {"python": python_version(), "lowmem-rmu": __version__}
    for package in PACKAGES:
        versions[package] = version(package)
    return {
        "preset": name,
        "settings": preset.model_dump(),
        "data": sources_record(sources or {}),
        "versions": versions,
        "device": device.type,
        "device_name": device_name,
        "seed": preset.rmu.seed,
        "model_revision": commit_of(preset.model.name, preset.model.revision) or preset.model.revision,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_done(folder: RunFolder, stage: str) -> bool:
    """Return whether a run need not go through the stage again."""
    if stage in SIDE_OF:
        return folder.evaluation(SIDE_OF[stage]).exists()
    return stage == "unlearn" and folder.adapter.exists()


def run_stages(context: RunContext) -> None:
    """Go through the stages of a run, skipping those that its folder shows to be done.

    Raises UserError for what the user can mend, and Stopped when asked to stop. `status.json` says the same.
    """
    try:
        with translated_errors(context):
            remove_unfinished(context.folder)
            for stage in context.stages:
                if not is_done(context.folder, stage):
                    context.status.started(stage)
                    # What an earlier stage has freed must not count for the peak of this one.
                    give_back_freed_memory()
                    reset_peak(context.device)
                    STAGE_FUNCTIONS[stage](context)
    except (Stopped, KeyboardInterrupt) as stop:
        context.status.end("stopped")
        if isinstance(stop, Stopped):
            dismiss(context.distributed)
        raise
    except BaseException as error:
        give_up(context, error)
        raise
    context.status.end("done")
    dismiss(context.distributed)


def evaluate_base(context: RunContext) -> None:
    """Measure the base model: the adapter, if there is one yet, is off."""
    load_model_for(context)
    with measured_cost(context, "evaluate-base"):
        with base_only(context.model):
            scores = evaluate_side(context, "base")
        write_harness_results(context, "base", scores)
    write_json(context.folder.evaluation("base"), scores)


def unlearn(context: RunContext) -> None:
    """Train the adapter, from the last checkpoint if there is one, and save it."""
    load_model_for(context)
    preset, folder = context.preset, context.folder
    with measured_cost(context, "unlearn"):
        context.status.started("unlearn", preset.rmu.steps)
        context.note("topic", remarks_on_topic(context))
        data = context.inputs.training_data(preset, context.is_whole)
        if preset.rmu.guard_every and data.guard is None:
            context.note("guard", [NO_TEXT_FOR_THE_GUARD])
        if not isinstance(context.model, PeftModel):
            context.model = add_adapter(context.model, preset.rmu, preset.model)
        if data.guard is not None and context.is_whole:
            context.note("texts", remarks_on_texts(context, data.guard))

        # Metrics beyond the checkpoint are written again by the resumed training.
        trainer = Trainer(context.model, preset.rmu, preset.topics, data, folder.cache)
        trainer.restore(folder.checkpoint)
        folder.truncate_metrics(trainer.progress.step)

        def report_step(row: dict[str, Any]) -> None:
            context.stage_peak = max(context.stage_peak, row["peak_memory_bytes"])
            folder.add_metrics(row)
            context.advance(row["step"], {key: row[key] for key in ("topic", "forget_loss", "retain_loss")})

        if not trainer.run(folder.checkpoint, report_step, context.status.asks_to_stop):
            raise Stopped(folder.path)
        if trainer.outcome:
            context.note("guard", [trainer.outcome] + ([] if context.is_whole else [TARGET_LAYER_ALONE]))
    save_trained_adapter(context)


def evaluate_unlearned(context: RunContext) -> None:
    """Measure the unlearned model: the same model with its adapter on."""
    load_model_for(context)
    if not isinstance(context.model, PeftModel):  # trained by an earlier process
        context.model = load_adapter(context.model, context.folder.adapter)
    with measured_cost(context, "evaluate-unlearned"):
        scores = evaluate_side(context, "unlearned")
        retain = context.inputs.held_out.get("retain")
        if retain is not None:
            batch_tokens = batch_tokens_of(context)
            scores["texts"]["retain"] |= divergence(
                context.model, context.inputs.tokenizer, retain.held_out, batch_tokens
            )
        write_harness_results(context, "unlearned", scores)
    write_json(context.folder.evaluation("unlearned"), scores)


def report(context: RunContext) -> None:
    """Compare both sides: write `summary.json` and `report.html`."""
    folder, preset = context.folder, context.preset
    base, unlearned = folder.read_evaluation("base"), folder.read_evaluation("unlearned")
    if base is None:
        raise UserError(
            f"{folder.path} holds no measurement of the base model to report on.",
            "Add evaluate-base to --stages.",
        )
    after = folder.read_answers("unlearned") if unlearned else None
    rows = compare_tasks(context.inputs.questions, folder.read_answers("base"), after)
    texts = compare_texts(context.inputs.text_roles, base["texts"], unlearned and unlearned["texts"])

    answers = {sample["prompt"]: sample["answer"] for sample in unlearned["samples"]} if unlearned else {}
    samples = []
    for sample in base["samples"]:
        prompt = sample["prompt"]
        samples.append(BothAnswers(prompt, sample["answer"], answers.get(prompt)))
    notes = []
    for sentences in folder.read_notes().values():
        notes += sentences
    summary = Summary(
        preset=folder.config["preset"],
        title=preset.title,
        model=short_name(preset.model.name),
        verdict=verdict(rows, texts),
        audit=audit_mark(folder),
        rows=rows,
        texts=texts,
        samples=samples,
        stages=folder.read_stages(),
        limit=preset.evaluation.limit,
        notes=notes,
        unasked=unasked_subjects(context.inputs.questions),
    )
    write_json(folder.path / "summary.json", asdict(summary))
    write_report(folder)


STAGE_FUNCTIONS: dict[str, Callable[[RunContext], None]] = {
    "evaluate-base": evaluate_base,
    "unlearn": unlearn,
    "evaluate-unlearned": evaluate_unlearned,
    "report": report,
}


def remove_unfinished(folder: RunFolder) -> None:
    """Remove what a killed process left: unfinished files, and the cache of a complete training."""
    for place in (folder.path, folder.path / "evaluation", folder.checkpoint):
        remove_leftovers(place)
    if is_done(folder, "unlearn"):
        shutil.rmtree(folder.cache, ignore_errors=True)


def load_model_for(context: RunContext) -> None:
    """Load what the remaining stages need: all layers if one of them evaluates, else only those up to the
    target layer.
    """
    if context.model is not None:
        return
    remaining = [stage for stage in context.stages if not is_done(context.folder, stage)]
    context.is_whole = any(stage in SIDE_OF for stage in remaining)
    layers = None if context.is_whole else context.preset.rmu.target_layer + 1
    context.model = context.spec.load(context.device, layers)
    write_json(context.folder.path / "weights.json", describe_weights(context.model))


def batch_tokens_of(context: RunContext) -> int:
    """Return how many tokens a forward pass of the evaluation takes; with `auto` it is measured once per
    run.
    """
    pad_id = context.inputs.tokenizer.pad_token_id
    wanted = context.preset.evaluation.batch_tokens
    return fixed_batch_tokens(wanted, context.model, pad_id, context.folder.path / "evaluation")


def evaluate_side(context: RunContext, side: str) -> dict[str, Any]:
    """Ask all questions, measure all held-out texts and answer the prompts. Returns the content of
    `evaluation/<side>.json`.
    """
    batch_tokens = batch_tokens_of(context)
    scores = ask_questions(context, side, batch_tokens)

    scores["texts"] = {}
    for name, samples in context.inputs.held_out.items():
        scores["texts"][name] = text_loss(
            context.model, context.inputs.tokenizer, samples.held_out, batch_tokens, samples.held_out_bytes
        )

    sampling = Sampling(max_new_tokens=context.preset.evaluation.max_new_tokens)
    scores["samples"] = []
    for prompt in context.preset.evaluation.prompts:
        conversation = [{"role": "user", "content": prompt}]
        text = answer(context.model, context.inputs.tokenizer, conversation, sampling)
        scores["samples"].append({"prompt": prompt, "answer": text})
    return scores


def ask_questions(context: RunContext, side: str, batch_tokens: int) -> dict[str, Any]:
    """Return the scores of all questions. The answers of the base model are shared with other runs of the
    same model.
    """
    questions, path = context.inputs.questions, context.folder.answers(side)
    if not questions:
        write_lines(path, [])
        return {"tasks": {}, "groups": {}, "seconds": 0.0, "questions_per_second": 0.0}
    context.status.started(f"evaluate-{side}", sum(len(question_set.questions) for question_set in questions))
    announce(context.distributed, side, batch_tokens, context.folder.adapter)
    shared = None
    if side == "base":
        shared = shared_answers(context.folder.path.parent, context.spec.digest(context.device))

    def report_answers(done: int, accuracy: float) -> bool:
        context.advance(done, {"accuracy": accuracy})
        return context.status.asks_to_stop()

    tokenizer = context.inputs.tokenizer
    try:
        evaluated = evaluate_and_keep(
            context.model,
            tokenizer,
            questions,
            batch_tokens,
            path,
            shared,
            report_answers,
            context.distributed,
        )
    except Interrupted as stop:
        raise Stopped(context.folder.path) from stop
    return evaluated.scores


def write_harness_results(context: RunContext, side: str, scores: dict[str, Any]) -> None:
    """Write the scores in the layout of lm-evaluation-harness too, for programs that read its files."""
    if context.inputs.questions:
        results = harness_results(
            scores, context.inputs.questions, short_name(context.preset.model.name), time.time()
        )
        write_json(context.folder.evaluation(side).with_name(f"harness_{side}.json"), results)


def remarks_on_topic(context: RunContext) -> list[str]:
    """Return what the base model's answers say about the topic before it is trained on."""
    scores = context.folder.read_evaluation("base")
    sentence = unknown_topic(scores["tasks"], context.inputs.questions) if scores else None
    return [sentence] if sentence else []


def remarks_on_texts(context: RunContext, guarded: GuardData) -> list[str]:
    """Return what the base model's perplexities say about the texts of the forget and the retain set."""
    tokenizer, batch_tokens = context.inputs.tokenizer, context.preset.evaluation.planned_batch_tokens
    with base_only(context.model):
        retain = perplexity_of(context.model, tokenizer, guarded.retain.texts, batch_tokens)
        topics = {}
        for name, kind in guarded.topics.items():
            topics[name] = perplexity_of(context.model, tokenizer, kind.texts, batch_tokens)
    return unlike_texts(topics, retain)


def save_trained_adapter(context: RunContext) -> None:
    """Save the adapter with its checksums. The folder takes its place once all of it is written."""
    folder, preset = context.folder, context.preset
    with folder_replaced(folder.adapter) as new:
        save_adapter(context.model, new)
        write_json(folder.path / DIGESTS, adapter_digests(new))
        with suppress(UserError):  # a checkpoint that cannot be merged into is no reason to lose the adapter
            write_json(folder.matrices, adapted_digests(new, context.spec, preset.rmu.target_layer + 1))
    shutil.rmtree(folder.cache, ignore_errors=True)


@contextmanager
def measured_cost(context: RunContext, stage: str) -> Iterator[None]:
    """Add time and peak memory of a stage to `stages.json`, also where the stage is stopped. A resumed stage
    counts as a whole.
    """
    started, context.stage_peak = time.monotonic(), 0
    try:
        yield
    finally:
        costs = {cost.stage: cost for cost in context.folder.read_stages()}
        before = costs.get(stage, StageCost(stage, 0.0, 0))
        peak = max(before.peak_memory_bytes or 0, context.stage_peak, memory_in_use(context.device))
        costs[stage] = StageCost(stage, before.seconds + time.monotonic() - started, peak)
        write_json(context.folder.path / "stages.json", [as_json(cost) for cost in costs.values()])


@contextmanager
def translated_errors(context: RunContext) -> Iterator[None]:
    """Turn running out of memory or disk into a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise out_of_memory(
                context.preset, context.spec, context.device, context.stages, context.status.stage
            ) from error
        if is_disk_full(error):
            folder = context.folder.path
            raise UserError(
                f"The disk that holds {folder} is full.",
                Fix("Make room, then go on with {action}.", ResumeRun(folder.name)),
            ) from error
        raise


def give_up(context: RunContext, error: BaseException) -> None:
    """Note why the run failed. A run that failed before it measured anything is removed; any other keeps what
    it has.
    """
    context.model = None
    gc.collect()
    folder = context.folder
    with suppress(OSError):  # a full disk must not hide why the run failed
        if isinstance(error, UserError) and not folder.has_results and not folder.output.exists():
            folder.remove()
        else:
            context.status.end("failed", error)
