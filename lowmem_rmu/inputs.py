"""The inputs of a run: everything that it reads except the model's weights, read before anything is
computed.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.schema import Preset, Role
from lowmem_rmu.data.corpora import GUARDED, FormShares, Samples, load_samples, mix, spread
from lowmem_rmu.data.questions import LETTERS, QuestionSet, load_questions
from lowmem_rmu.data.sources import Sources, corpora_of, find_sources
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.unlearning.guard import GuardData, Kind
from lowmem_rmu.unlearning.steering import cues
from lowmem_rmu.unlearning.trainer import TrainingData

SIDE_OF = {"evaluate-base": "base", "evaluate-unlearned": "unlearned"}
"""The side that an evaluating stage measures."""


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, the questions, and the texts of a run."""

    tokenizer: PreTrainedTokenizerBase
    questions: list[QuestionSet]
    forget: dict[str, Samples]
    """By topic."""
    retain: Samples
    sources: Sources = field(default_factory=dict)
    """The local files that all of it came from."""

    @property
    def held_out(self) -> dict[str, Samples]:
        """The corpora that hold text out, by name: the topics, and `retain`."""
        named = self.forget | {"retain": self.retain}
        return {name: samples for name, samples in named.items() if samples.held_out}

    @property
    def text_roles(self) -> dict[str, Role]:
        """Whether each held-out text is to be forgotten or kept."""
        return {name: "forgotten" if name in self.forget else "kept" for name in self.held_out}

    def guard_data(self) -> GuardData | None:
        """Return what the guard measures, or None where a corpus is too small to put anything aside."""
        topics = {name: Kind(samples.guarded, samples.prompts) for name, samples in self.forget.items()}
        retain = Kind(self.retain.guarded, self.retain.prompts)
        if not retain.texts or not all(kind.texts for kind in topics.values()):
            return None
        letters = self.tokenizer([f" {letter}" for letter in LETTERS], add_special_tokens=False)["input_ids"]
        return GuardData(retain, topics, [ids[-1] for ids in letters])

    def training_data(self, preset: Preset, is_whole: bool) -> TrainingData:
        """Return what the trainer needs. `is_whole`: whether all layers of the model are loaded."""
        return TrainingData(
            forget={name: samples.train for name, samples in self.forget.items()},
            retain=self.retain.train,
            pad_id=self.tokenizer.pad_token_id,
            cues={
                name: encode_texts(self.tokenizer, cues(name, topic)) for name, topic in preset.topics.items()
            },
            guard=self.guard_data(),
            is_whole=is_whole,
        )


def read_inputs(preset: Preset, spec: ModelSpec, stages: list[str]) -> Inputs:
    """Check the model's shape, and read every question and corpus. `spec` is the preset's model. Raises
    UserError.
    """
    spec.check_adapter()
    evaluates = any(stage in SIDE_OF for stage in stages)
    spec.check_checkpoint(None if evaluates else preset.rmu.target_layer + 1)

    tokenizer = spec.tokenizer
    questions = load_questions(preset.evaluation)
    sources = find_sources(preset, needs_text(preset, stages))
    if not needs_text(preset, stages):
        return Inputs(tokenizer, questions, {}, Samples([], []), sources)
    forget = read_forget_sets(preset, tokenizer)
    retain = read_retain_set(preset, tokenizer)
    return Inputs(tokenizer, questions, forget, retain, sources)


def needs_text(preset: Preset, stages: list[str]) -> bool:
    """Return whether the stages read the preset's corpora: to train on them, or to measure what is held
    out.
    """
    return "unlearn" in stages or any(corpus.held_out for corpus in corpora_of(preset).values())


def read_forget_sets(preset: Preset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Samples]:
    """Return the samples of each topic. Raises UserError where one has fewer than a batch."""
    forget = {}
    for name, topic in preset.topics.items():
        shares = FormShares(topic.questions)
        forget[name] = load_samples(
            topic.corpus, tokenizer, topic.max_tokens, shares, preset.rmu.guard_every > 0
        )
        check_fills_batch(f"topics.{name}", forget[name], preset.rmu.batch_size)
    return forget


def read_retain_set(preset: Preset, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Return the samples of all retain corpora, mixed in their shares. Raises UserError where they are fewer
    than a batch.
    """
    settings = preset.retain
    shares = FormShares(settings.questions, settings.chat)
    parts = [
        load_samples(corpus, tokenizer, settings.max_tokens, shares, preset.rmu.guard_every > 0)
        for corpus in settings.corpora
    ]
    retain = Samples(
        train=mix([part.train for part in parts], [corpus.share for corpus in settings.corpora]),
        held_out=sum((part.held_out for part in parts), []),
        held_out_bytes=sum((part.held_out_bytes for part in parts), []),
        prompts=spread(sum((part.prompts for part in parts), []), GUARDED),
        guarded=spread(sum((part.guarded for part in parts), []), GUARDED),
    )
    check_fills_batch("retain", retain, preset.rmu.retain_batch_size or preset.rmu.batch_size)
    return retain


def check_fills_batch(name: str, samples: Samples, batch_size: int) -> None:
    """Raise UserError where a corpus gives fewer samples than one batch."""
    if len(samples.train) < batch_size:
        raise UserError(
            f"The corpus of {name} gives {len(samples.train)} samples, fewer than one batch of {batch_size}.",
            "Add text, or lower rmu.batch_size.",
        )
