"""What a preset may hold: the settings of a run, their types, ranges and defaults."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lowmem_rmu.parsing import parse_yaml

TASKS_FILE = Path(__file__).resolve().parent / "tasks.yaml"
SMALLEST_BATCH = 512
"""Tokens of the smallest batch that `evaluation.batch_tokens: auto` tries."""
Role = Literal["forgotten", "measured", "adjacent", "kept"]


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return pattern


Regex = Annotated[str, AfterValidator(_regex)]


class Section(BaseModel):
    """A part of a preset: unknown keys are errors, numbers are finite, and values are fixed once read.

    Every number has a range. Its upper end is far beyond what anybody uses: it keeps out slips (`1e30`) that
    would train to nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model, and how it is kept in memory."""

    name: str
    """A Hub id (`owner/name`), or a local folder: a path that starts with `./`, `../`, `/` or `~`."""
    revision: str | None = None
    """The Hub commit, tag or branch."""
    quantisation: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit with double quantisation. `none`: in `dtype`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of everything that is not quantised, and of the arithmetic. `auto`: bfloat16 on a GPU, float32 on a
    CPU.
    """
    device_map: Literal["one", "auto"] = "one"
    """`auto`: spread over all GPUs, and main memory where they do not suffice, for models beyond one GPU."""
    config: dict[str, Any] | None = None
    """The model's shape (as in its `config.json`), so that the plan needs no download."""


class Corpus(Section):
    """Running text: a Hub data set, or local `.txt`, `.md` and `.jsonl` files and folders of them.

    Of a folder, hidden files and those about the data (README, LICENSE, ...) are never read.
    """

    source: str
    """A Hub id, or a local path that starts with `./`, `../`, `/` or `~` (relative paths: from the preset's
    folder).
    """
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    """The column of a Hub data set or the key of a JSON line that holds the text."""
    title_matches: Regex | None = None
    """Only for WikiText: keep the articles whose title matches."""
    title_excludes: Regex | None = None
    """Only for WikiText: keep the articles whose title does not match."""
    detokenize: bool = True
    """Give tokenized text, as WikiText is (`film , television`, `co @-@ star`, `<unk>`), its ordinary
    spelling back.
    """
    long_documents: Literal["split", "truncate"] = "split"
    """Text beyond the maximum tokens becomes further samples, or is left out as in the paper."""
    min_characters: int = Field(0, ge=0, le=10**9)
    """Shorter documents (headings, empty lines) are left out."""
    held_out: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of documents that training never sees; their loss is reported before and after."""
    share: float | None = Field(None, gt=0, lt=1)
    """Only in a retain set: the share of its samples that come from this corpus, which are repeated or left
    out to reach it. Corpora without a share divide the rest by their size.
    """
    without_access: str | None = None
    """What to do where access to a gated data set is not granted, e.g. another preset."""


class Topic(Section):
    """What is to be forgotten, and how hard."""

    corpus: Corpus
    alpha: float = Field(150, ge=0, le=1e9)
    """Weight of the retain loss in this topic's steps. It is a pure number: both losses are in the units of
    the target layer's activations (docs/selectivity.md).
    """
    steering: Literal["random", "adaptive", "contrastive"] = "adaptive"
    """Where forget activations are pushed to. `random`: a control vector of the length `steering_coefficient`
    (RMU). `adaptive`: one whose length is `adaptive_scale` times the typical activation norm (arXiv
    2408.06223). `contrastive`: the frozen activation plus `steering_coefficient` times the direction from an
    expert in `about` to a novice (CUT, arXiv 2403.03218v1).
    """
    steering_coefficient: float | None = Field(None, gt=0, le=1e9)
    adaptive_scale: float = Field(1.5, gt=0, le=1000)
    """The longer the vector, the more of it reaches text that only resembles the topic (docs/selectivity.md).
    The authors take 5.
    """
    contrastive_direction: Literal["unit", "raw"] | None = None
    """Only for `contrastive`. `unit`: the direction has unit length, as in the authors' code; the default.
    `raw`: the difference of activations as it is, with the sentences of earlier versions; runs recorded
    without this key were made so.
    """
    about: str | None = None
    """What novice and expert are asked about; the topic's name if left out."""
    max_tokens: int = Field(512, ge=2, le=10**6)
    """Tokens of a forget sample at most."""
    questions: float = Field(0.25, ge=0, le=100)
    """Multiple-choice questions made of the topic's text, per sample of prose: they are forgotten too."""

    @model_validator(mode="after")
    def _share_in_the_retain_set_alone(self) -> "Topic":
        if self.corpus.share is not None:
            raise ValueError("corpus.share counts in the retain set only: leave it out of a topic")
        return self

    @model_validator(mode="after")
    def _coefficient_where_it_counts(self) -> "Topic":
        if self.steering != "adaptive" and self.steering_coefficient is None:
            raise ValueError(f"steering: {self.steering} takes a steering_coefficient")
        if self.steering == "adaptive" and self.steering_coefficient is not None:
            raise ValueError(
                "steering: adaptive finds its own steering_coefficient: leave it out, or set steering: random"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _unit_direction(cls, given: Any) -> Any:
        """Fill in the contrastive direction, so that every run records the one that it was made with."""
        if not isinstance(given, dict) or given.get("steering") != "contrastive":
            return given
        return given | {"contrastive_direction": given.get("contrastive_direction") or "unit"}


class Retain(Section):
    """What must stay as it is: all corpora together, shuffled where `rmu.shuffle` is on."""

    corpora: list[Corpus] = Field(min_length=1)
    max_tokens: int = Field(512, ge=2, le=10**6)
    questions: float = Field(0.5, ge=0, le=100)
    """Multiple-choice questions made of the retain text, per sample of prose. Without any, a model may come
    to treat every question as part of the topic.
    """
    chat: float = Field(0.25, ge=0, le=100)
    """Conversations made of the retain text in the model's chat template, per sample of prose."""

    @model_validator(mode="after")
    def _shares_leave_a_rest(self) -> "Retain":
        shares = [corpus.share for corpus in self.corpora if corpus.share is not None]
        if len(shares) == len(self.corpora):
            raise ValueError("every corpus has a share: leave it out of one at least, which gets the rest")
        if sum(shares) >= 1:
            raise ValueError(
                f"the shares of the corpora add up to {sum(shares):g}: together they must stay below 1"
            )
        return self


class Rmu(Section):
    """Representation misdirection for unlearning (arXiv 2403.03218)."""

    target_layer: int = Field(ge=0, lt=10_000)
    """0-based; its output is steered. Nothing above it takes part in training. A preset that names neither
    this nor `adapter_layers` gets them by the model's depth (`layers_by_depth`), where the number of its
    layers is known before anything is downloaded.
    """
    adapter_layers: list[int] = Field(min_length=1)
    """The layers that get adapters: at or below the target layer."""
    modules: list[str] = Field(["down_proj"], min_length=1)
    """Names of the linear modules that get adapters, as in PEFT's `target_modules`."""
    trainable: Literal["lora", "weights"] = "lora"
    """`lora`: low-rank adapters. `weights`: the modules' own matrices, kept in high precision and trained
    directly, as in the paper.
    """
    rank: int = Field(16, ge=1, le=2**16)
    lora_alpha: int | None = Field(None, gt=0, le=10**6)
    """LoRA's scale is `lora_alpha / rank`; the rank if left out."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps AdamW's two moments in 8 bits (bitsandbytes): a quarter of their memory."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    schedule: Literal["constant", "linear"] = "constant"
    """`linear`: the learning rate falls to zero over the steps, so that training comes to rest between topic
    and retain set.
    """
    steps: int = Field(150, ge=1, le=10**6)
    """Optimiser steps in all; topics take turns."""
    batch_size: int = Field(4, ge=1, le=10**5)
    """Forget samples a step."""
    retain_batch_size: int | None = Field(None, ge=1, le=10**5)
    """Retain samples a step; `batch_size` if left out."""
    max_grad_norm: float | None = Field(1.0, gt=0, le=1e9)
    """Gradients are clipped to this norm; null: never, as in the paper."""
    shuffle: bool = True
    """On: batches of samples of like length, in a new order every epoch. Off: samples in the order of the
    corpus, as in the paper.
    """
    padding: Literal["masked", "paper"] = "masked"
    """`masked`: losses over real tokens. `paper`: left padding, losses over every position, padding too."""
    sinks: Literal["masked", "counted"] | None = None
    """Positions whose activation is many times larger than the rest of their sample's (attention sinks, arXiv
    2402.17762). `masked`: they are not steered, and what they lose counts relative to their size. `counted`:
    like any other position, as in the paper. If left out: `counted` with `padding: paper`, else `masked`.
    """
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    cache_gib: float = Field(1.0, ge=0, le=10**6)
    """Gibibytes at most for what the frozen layers give on batches that come again (the hidden-state
    cache).
    """
    cache_in: Literal["memory", "disk"] = "memory"
    """Where that is kept: main memory, or the run folder."""
    checkpoint_every: int = Field(50, ge=1, le=10**6)
    """Steps between checkpoints that `--resume` can go on from."""
    guard_every: int = Field(10, ge=0, le=10**6)
    """Steps between the guard's looks at text and questions that training does not see; 0: never. Training
    ends early once the topic is far from base with the rest within the limit.
    """
    guard_limit: float = Field(0.3, gt=0, le=100)
    """Nats per token by which retain text and questions about it may diverge from base. Training ends when
    two checks in a row exceed it, and the best earlier point is kept.
    """
    guard_shift_limit: float = Field(0.25, gt=0, le=100)
    """The same for a run that evaluates nothing and loads no layer above the target layer: how far the target
    layer's output may move, relative to its size.
    """
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """What torch takes as a seed."""

    @property
    def masks_sinks(self) -> bool:
        """Whether attention sinks are left out of steering."""
        return self.sinks == "masked"

    @model_validator(mode="before")
    @classmethod
    def _sinks_as_padding(cls, given: Any) -> Any:
        """Fill in what becomes of sinks, so that every run records how it was made."""
        if not isinstance(given, dict) or given.get("sinks") is not None:
            return given
        return given | {"sinks": "counted" if given.get("padding") == "paper" else "masked"}

    @model_validator(mode="after")
    def _layers_at_or_below_target(self) -> "Rmu":
        above = [layer for layer in self.adapter_layers if layer > self.target_layer]
        if above:
            raise ValueError(
                f"adapter_layers {above} lie above target_layer {self.target_layer} and could not "
                "learn anything"
            )
        if min(self.adapter_layers) < 0:
            raise ValueError("adapter_layers count from 0")
        if len(set(self.adapter_layers)) < len(self.adapter_layers):
            raise ValueError("adapter_layers names a layer twice")
        return self


class Task(Section):
    """A-D questions: a Hub data set, a local JSONL or CSV file (`question, choices, answer`), or a folder.

    In a folder, every file is a subject. One whose name ends in a split (`_dev`, `_val`, `_test`, ...)
    belongs to that split alone.

    A name of `tasks.yaml` (`wmdp_bio`, `mmlu`, ...) brings its settings along; a preset gives what differs.
    """

    source: str
    subset: str | None = None
    split: str = "test"
    """Of a folder: its subfolder, where it has one of that name."""
    about: str | None = None
    """What the prompt says the questions are about; the subject's or the task's name if left out."""
    subject_column: str | None = None
    """The column of a Hub data set that splits it into subjects."""
    subjects: list[str] | None = Field(None, min_length=1)
    """Only these subjects."""
    scoring: Literal["letters", "cloze"] = "letters"
    """`letters`: the choice whose letter is the most likely. `cloze`: the choice whose text is, a character;
    for models too small for letters.
    """
    num_fewshot: int = Field(0, ge=0, le=10**4)
    """Answered examples in front of every question: the first ones of `examples_split`."""
    examples_split: str | None = None
    role: Role
    """What the verdict expects: `forgotten` to fall, `kept` and `adjacent` to stay, `measured` nothing."""
    adjacent: list[str] = []
    """Subjects that lie next to a forgotten topic: their role is `adjacent`."""
    group: str | None = None
    """Tasks of the same group get an average together."""
    averages: dict[str, list[str]] = {}
    """Averages over some of the subjects, by name."""

    @model_validator(mode="after")
    def _examples_where_they_count(self) -> "Task":
        if self.num_fewshot and self.examples_split is None:
            raise ValueError(
                f"num_fewshot {self.num_fewshot} takes an examples_split; this task has none, so ask "
                "it with 0"
            )
        return self


class Evaluation(Section):
    """What is measured before and after."""

    tasks: dict[str, Task] = {}
    limit: int | None = Field(None, ge=1, le=10**9)
    """Questions per task at most, spread over its subjects in proportion: the same sample every time. Of more
    subjects than questions, the smallest get none, which the results say."""
    limit_by: Literal["largest_remainder", "one_per_subject"] = "largest_remainder"
    """How `limit` is allocated. `one_per_subject`: in rounded shares, one at least, so that more than `limit`
    may be asked, as older versions did.
    """
    batch_tokens: Annotated[int, Field(ge=1, le=10**8)] | Literal["auto"] = 4096
    """Tokens in one forward pass at most, padding included. `auto`: what is fastest, tried out before the
    first question; then the memory plan only knows the least that it may be.
    """
    prompts: list[str] = []
    """Asked of base and unlearned for the report and as suggestions in the chat."""
    max_new_tokens: int = Field(64, ge=1, le=10**6)

    @property
    def planned_batch_tokens(self) -> int:
        """What the memory plan counts with: `auto` takes more only where there is room."""
        return SMALLEST_BATCH if self.batch_tokens == "auto" else self.batch_tokens

    @model_validator(mode="before")
    @classmethod
    def _known_tasks(cls, given: Any) -> Any:
        """Fill in what a preset leaves out of a task that is known by its name."""
        if not isinstance(given, dict) or not isinstance(given.get("tasks"), dict):
            return given
        known = known_tasks()
        tasks = {
            name: {**known.get(name, {}), **task} if isinstance(task, dict) else task
            for name, task in given["tasks"].items()
        }
        return given | {"tasks": tasks}


class Preset(Section):
    """Everything that decides a run."""

    title: str
    model: ModelSettings
    rmu: Rmu
    topics: dict[str, Topic] = Field(min_length=1)
    retain: Retain
    evaluation: Evaluation = Evaluation()


@cache
def known_tasks() -> dict[str, dict[str, Any]]:
    """Return the field's tasks by name, as settings of a `Task`."""
    return parse_yaml(TASKS_FILE.read_text(encoding="utf-8"))[0]
