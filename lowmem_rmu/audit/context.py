"""Who is audited: a model as base and as unlearned, one of them in memory, and the texts and questions to try
it with.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lowmem_rmu.audit.knowledge import ENOUGH, Knowledge, Questions, Texts, evenly, held_out_documents, untold
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.config.schema import ModelSettings, Preset
from lowmem_rmu.data.corpora import read_documents, split_held_out, tokenise
from lowmem_rmu.data.questions import QuestionSet, load_questions
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.multiple_choice import Asked, ask
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.layers import decoder_layers
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights.shards import give_back_freed_memory

Side = Literal["base", "unlearned"]
SIDES: tuple[Side, ...] = ("base", "unlearned")
FRESH = "attack"
"""What the adapter is called that an attack trains on top."""
RANK = 16
QUESTIONS = 100
"""Questions per forgotten task by default."""


@dataclass(frozen=True)
class Sides:
    """Where base and unlearned come from: `unlearned` is an adapter on the base, or another checkpoint of the
    same shape and tokenizer.
    """

    base: ModelSpec
    unlearned: Path | ModelSpec


@dataclass
class Audited:
    """`side` lends the model as base or unlearned; texts are token sequences, documents the same as text."""

    name: str
    preset: Preset
    sides: Sides
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    knowledge: Knowledge
    told: bool
    """Whether the text to relearn from may hold answers to the questions."""
    kept: list[QuestionSet]
    """Tasks that were to stay."""
    measured: list[QuestionSet]
    """Tasks that were neither to stay nor to go."""
    relearning: list[list[int]]
    """Text about what was forgotten that unlearning never saw."""
    forget: list[list[int]]
    """Text about what was forgotten."""
    benign: list[list[int]]
    """Text about anything else."""
    seed: int = 0
    _loaded: Any = field(default=None, repr=False)
    _loaded_from: ModelSpec | None = field(default=None, repr=False)

    @contextmanager
    def side(self, side: Side) -> Iterator[Any]:
        """Yield the model as base or unlearned, frozen."""
        model = self._load(side)
        with base_only(model) if side == "base" else nullcontext():
            yield model

    def measure(self, side: Side) -> Values:
        """Measure what a side knows of each item."""
        with self.side(side) as model:
            return self.knowledge.of(model)

    @contextmanager
    def learning(self, side: Side, seed: int) -> Iterator[Any]:
        """Yield the model on a side with a fresh LoRA on every linear module of every layer, which alone is
        trained and is removed afterwards.
        """
        model = self._load(side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(model, PeftModel):
                model.add_adapter(FRESH, fresh_config(model))
                learner: Any = model
            else:
                learner = get_peft_model(model, fresh_config(model), adapter_name=FRESH)
        own, tuner = [name for name in learner.peft_config if name != FRESH], learner.base_model
        try:
            tuner.set_adapter([*(own if side == "unlearned" else []), FRESH])
            for name, parameter in learner.named_parameters():
                parameter.requires_grad_(f".{FRESH}." in name)
            yield learner
        finally:
            if own:
                tuner.set_adapter(own)  # first, or PEFT warns that it takes away what is active
                learner.delete_adapter(FRESH)
            else:
                learner.unload()
            learner.requires_grad_(False)

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def free(self) -> None:
        """Take the model out of memory; `side` loads it again."""
        self._loaded = self._loaded_from = None
        gc.collect()
        give_back_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, side: Side) -> Any:
        unlearned = self.sides.unlearned
        wanted = unlearned if side == "unlearned" and isinstance(unlearned, ModelSpec) else self.sides.base
        if self._loaded_from is not wanted:
            self.free()
            model: Any = wanted.load(self.device)
            self._loaded = load_adapter(model, unlearned) if isinstance(unlearned, Path) else model
            self._loaded_from = wanted
        return self._loaded


def fresh_config(model: nn.Module) -> LoraConfig:
    """LoRA on every linear module of every decoder layer, but fused experts and matrices that unlearning
    trained themselves.
    """
    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    trained = [name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    names = linear_names(model)
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=names,
        exclude_modules=trained or None,
        task_type="CAUSAL_LM",
    )


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear modules of all decoder layers, with or without adapters on them."""
    modules = [named for layer in decoder_layers(model) for named in layer.named_modules()]
    return sorted(
        {
            name.split(".base_layer")[0].rpartition(".")[2]
            for name, module in modules
            if _is_linear(name, module)
        }
    )


def _is_linear(name: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear | Conv1D)
        and ".lora_" not in f".{name}"
        and ".modules_to_save." not in f".{name}"
    )


def prepare(
    name: str,
    preset: Preset,
    unlearned: Path | ModelSettings,
    device: torch.device,
    forgotten: list[str],
    limit: int | None,
    seed: int,
) -> Audited:
    """Read the questions and texts that attacks work with. `forgotten` names the tasks that the model forgot.

    Raises UserError where nothing is there to measure what it knows with.
    """
    spec = ModelSpec.of_preset(preset)
    spec.check_checkpoint()
    tokenizer = spec.tokenizer
    sets = load_questions(preset.evaluation)
    lost = [each for each in sets if (each.group or each.name) in forgotten]
    told_by, measured = held_out_documents(topic.corpus for topic in preset.topics.values())
    batch_tokens, longest = (
        preset.evaluation.planned_batch_tokens,
        max(topic.max_tokens for topic in preset.topics.values()),
    )
    questions, told = choose_questions(lost, told_by, limit or QUESTIONS)
    knowledge: Knowledge
    if questions:
        knowledge = Questions(questions, tokenizer, batch_tokens)
    else:
        sequences = tokenise(measured, tokenizer, longest, split=True)
        if not sequences:
            raise UserError(
                f"Nothing tells what {name} knows of what it forgot: it asks no questions about it, and "
                "holds fewer than two documents out.",
                "Make a run with questions of the role forgotten, or with more held out "
                "(topics.NAME.corpus.held_out=0.2).",
            )
        knowledge, told = Texts(sequences, tokenizer, batch_tokens), False
    trained = [
        text
        for topic in preset.topics.values()
        for text in split_held_out(read_documents(topic.corpus), topic.corpus.held_out)[0]
    ]
    benign = [
        text
        for corpus in preset.retain.corpora
        for text in split_held_out(read_documents(corpus), corpus.held_out)[0]
    ]
    sides = Sides(spec, unlearned if isinstance(unlearned, Path) else ModelSpec(unlearned, preset.rmu))
    return Audited(
        name,
        preset,
        sides,
        device,
        tokenizer,
        knowledge,
        told,
        [each for each in sets if each.role in ("kept", "adjacent")],
        [each for each in sets if each.role == "measured" and each not in lost],
        tokenise(told_by, tokenizer, longest, split=True),
        tokenise(trained, tokenizer, longest, split=True),
        tokenise(benign, tokenizer, preset.retain.max_tokens, split=True),
        seed,
    )


def choose_questions(sets: list[QuestionSet], documents: list[str], limit: int) -> tuple[list[Asked], bool]:
    """At most `limit` questions a task that the documents do not tell about; where those are too few, of all,
    and True.
    """
    tasks: dict[str, list[QuestionSet]] = {}
    for each in sets:
        tasks.setdefault(each.group or each.name, []).append(each)
    free = {task: untold(ask(members), documents) for task, members in tasks.items()}
    told = any(len(each) < ENOUGH for each in free.values())
    chosen: list[Asked] = []
    for task, members in tasks.items():
        chosen += evenly(ask(members) if told else free[task], limit)
    return chosen, told
