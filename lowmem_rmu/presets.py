"""Typed presets: YAML in, a checked `Preset` out, or one complete list of what is wrong with it."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowmem_rmu.errors import UserError, nearest, shortened, shown
from lowmem_rmu.parsing import MAX_DEPTH, ParseError, parse_json, parse_yaml
from lowmem_rmu.runs import RunFolder

PRESETS_FOLDER = Path(__file__).resolve().parent.parent / "presets"
TASKS_FILE = Path(__file__).resolve().parent / "tasks.yaml"
SMALLEST_BATCH = 512
"""Tokens of the smallest batch that `evaluation.batch_tokens: auto` tries."""
MISTAKES_SHOWN = 30
"""Mistakes of a preset that one message lists."""
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


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml"))


def find_preset(name_or_path: str) -> Path:
    """Return the YAML file of a shipped preset, or of a path."""
    if name_or_path in preset_names():
        return PRESETS_FOLDER / f"{name_or_path}.yaml"
    if Path(name_or_path).suffix.lower() in (".yaml", ".yml"):
        try:
            path = Path(name_or_path).expanduser()
            if path.is_file():
                return path
        except (OSError, RuntimeError):  # a name that is too long, or the home folder of nobody
            path = Path(name_or_path)
        raise UserError(
            f"Preset file {path} does not exist.",
            "Check the path, or see the shipped presets with --list.",
        )
    raise UserError(
        f'There is no preset "{shortened(name_or_path)}". {nearest(name_or_path, preset_names())}',
        "See them all with --list, or give the path of a YAML file.",
    )


def load_preset(
    name_or_path: str, overrides: list[str] | None = None, labels: Mapping[str, str] | None = None
) -> Preset:
    """Read and check a preset; `overrides` are `key.path=value` with YAML values.

    `labels` say what a form calls a setting, by its dotted path. Raises UserError with every mistake at once,
    each with the place of its value: a line of the file, the form's field, or the path that followed `--set`.
    """
    path = find_preset(name_or_path)
    try:
        content, tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except ParseError as error:
        where = f"{path}, line {error.line}:" if error.line else f"{path} cannot be read as a preset:"
        raise UserError(f"{where} {error.problem}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a preset: {error}.") from error
    if tree is None or not isinstance(content, dict):
        raise UserError(f"{path} holds no preset: expected keys such as model, rmu, topics, retain.")
    given = Given(labels)
    for change in overrides or []:
        given.paths.add(override(content, change, labels))
    content = layers_by_depth(resolve_paths(content, path.parent, given.paths))
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        raise UserError(_complaint(path, tree, content, error, given)) from error


def recorded_preset(settings: Any, where: Path) -> Preset:
    """Return the settings that a run folder holds. Raises UserError where another version wrote them and this
    one reads them no more.
    """
    try:
        return Preset.model_validate(with_recorded_defaults(settings))
    except ValidationError as error:
        named = ", ".join(sorted({".".join(map(str, problem["loc"])) for problem in error.errors()}))
        raise UserError(
            f"{where} was written by another version of lowmem-rmu: this one does not know its settings of "
            f"{named}.",
            "Read it with the version that its config.json names, or make the run again.",
        ) from error


def preset_of_run(config: Mapping[str, Any], where: Path) -> Preset:
    """Return the settings of a run, with a model of the Hub pinned to the commit that the run was made with.

    `config` is the content of the run's `config.json`, `where` its folder. Raises UserError as
    `recorded_preset` does.
    """
    preset = recorded_preset(config["settings"], where)
    revision = config.get("model_revision")
    if is_local(preset.model.name) or revision is None:
        return preset
    model = preset.model.model_copy(update={"revision": revision})
    return preset.model_copy(update={"model": model})


def read_preset(folder: RunFolder, pinned: bool = True) -> Preset:
    """Return the settings of a run as its `config.json` holds them.

    `pinned`: with a model of the Hub at the commit that the run was made with. Raises UserError as
    `recorded_preset` does.
    """
    config = folder.config
    return preset_of_run(config, folder.path) if pinned else recorded_preset(config["settings"], folder.path)


RMU_BEFORE = {
    "sinks": "counted",
    "guard_every": 0,
    "guard_limit": 0.3,
    "guard_shift_limit": 0.25,
    "schedule": "constant",
}
"""What earlier versions did in place of settings of `rmu` that they did not know."""


def with_recorded_defaults(settings: Any) -> Any:
    """Return recorded settings of a preset, or of a checkpoint, with what earlier versions did where they had
    no key.

    A contrastive topic without `contrastive_direction` was steered along the raw difference; a limit was
    allocated otherwise; attention sinks counted like any other position; there were no samples in other forms
    than prose, and no guard.
    """
    if isinstance(settings, dict) and "evaluation" in settings:
        settings = settings | {"evaluation": recorded_evaluation(settings["evaluation"])}
    if isinstance(settings, dict) and isinstance(settings.get("rmu"), dict):
        settings = settings | {"rmu": RMU_BEFORE | settings["rmu"]}
    if isinstance(settings, dict) and isinstance(settings.get("retain"), dict):
        settings = settings | {"retain": recorded_retain(settings["retain"])}
    topics = settings.get("topics") if isinstance(settings, dict) else None
    if not isinstance(topics, dict):
        return settings
    return settings | {"topics": {name: recorded_topic(topic) for name, topic in topics.items()}}


def recorded_retain(retain: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a retain set as they were meant: older versions made no samples in other forms than
    prose.
    """
    corpora = retain.get("corpora")
    found = {"corpora": [recorded_corpus(corpus) for corpus in corpora]} if isinstance(corpora, list) else {}
    return {"questions": 0, "chat": 0} | retain | found


def recorded_corpus(corpus: Any) -> Any:
    """Return settings of a corpus as they were meant: older versions left tokenized text as it was, and knew
    no shares.
    """
    return {"detokenize": False, "share": None} | corpus if isinstance(corpus, dict) else corpus


def recorded_topic(topic: Any) -> Any:
    """Return settings of a topic as they were meant: older versions made no questions, and knew one
    contrastive direction.
    """
    if not isinstance(topic, dict):
        return topic
    direction = {"contrastive_direction": "raw"} if topic.get("steering") == "contrastive" else {}
    corpus = {"corpus": recorded_corpus(topic["corpus"])} if "corpus" in topic else {}
    return {"questions": 0} | direction | topic | corpus


def recorded_evaluation(settings: Any) -> Any:
    """Return settings of an evaluation as they were meant: older versions allocated a limit otherwise."""
    if not isinstance(settings, dict) or "limit_by" in settings:
        return settings
    has_limit = settings.get("limit") is not None
    return settings | {"limit_by": "one_per_subject" if has_limit else "largest_remainder"}


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Return the paths at which two settings differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return [
            path
            for key in keys
            for path in differences(first.get(key), second.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if first == second else [where]


def is_local(source: str) -> bool:
    """Return whether a model or data source is a path and not a Hub id."""
    return (
        source.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or source in (".", "..")
        or Path(source).is_absolute()
    )


def as_path(name: str) -> Path:
    """Return a path with `~` spelled out. Raises UserError for what can be no path: too long, with a NUL, in
    the home of nobody.
    """
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"The path {name[:80]!r} cannot be read: {reason}.") from error
    return path


def is_folder(start: Path, name: str) -> bool:
    """Return whether a model's name, such as `models/llama`, is a folder that lies in `start`: it is then
    that folder, and no Hub id.
    """
    return bool(name.strip()) and "://" not in name and (start / as_path(name)).is_dir()


def short_name(model: str) -> str:
    """Return a Hub id as it is; of a local path the last two parts, for reports are shared."""
    return "/".join(Path(model).parts[-2:]) if is_local(model) else model


def without_places(settings: Any, where: str = "") -> Any:
    """Return the same settings with every path of this machine cut to its last two parts: for what is
    shared.
    """
    if isinstance(settings, dict):
        return {key: without_places(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [without_places(value, where) for value in settings]
    return short_name(settings) if isinstance(settings, str) and where in ("source", "name") else settings


def resolve_paths(content: Any, folder: Path, overridden: set[str], where: str = "") -> Any:
    """Make local `source` and `model.name` absolute: from the preset's folder, or from here where `--set`
    gave them.
    """
    if isinstance(content, list):
        return [
            resolve_paths(item, folder, overridden, f"{where}.{index}") for index, item in enumerate(content)
        ]
    if not isinstance(content, dict):
        is_source = where.rpartition(".")[2] == "source" or where == "model.name"
        given_here = any(where == key or where.startswith(f"{key}.") for key in overridden)
        start = Path.cwd() if given_here else folder
        if is_source and isinstance(content, str):
            try:
                if is_local(content) or (where == "model.name" and is_folder(start, content)):
                    return str((start / as_path(content)).resolve())
            except UserError as error:
                raise UserError(f"{shortened(where)}: {error}") from error
        return content
    return {
        key: resolve_paths(value, folder, overridden, f"{where}.{key}" if where else str(key))
        for key, value in content.items()
    }


DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What a model's configuration calls the number of its layers."""


def layers_by_depth(content: Any) -> Any:
    """Return a preset's content with `rmu.target_layer` and `rmu.adapter_layers` by the model's depth, where
    it leaves both out.

    The target layer lies a quarter of the way up, as in the WMDP paper, and the adapters on it and on the two
    layers below it. A target layer at a quarter and at 40% did equally well (docs/selectivity.md). Content
    that does not hold what is needed is returned as it is.
    """
    if not isinstance(content, dict) or not isinstance(content.get("rmu", {}), dict):
        return content
    rmu = content.get("rmu", {})
    layers = model_depth(content.get("model"))
    if layers is None or "target_layer" in rmu or "adapter_layers" in rmu:
        return content
    target = layers // 4
    found = {"target_layer": target, "adapter_layers": list(range(max(0, target - 2), target + 1))}
    return content | {"rmu": found | rmu}


def model_depth(model: Any) -> int | None:
    """Return the number of layers of a preset's model, None if it is not known here.

    A local model's own `config.json` says it, for a model on the Hub the preset's `model.config`.
    """
    if not isinstance(model, dict):
        return None
    name = model.get("name")
    config = local_config(name) if isinstance(name, str) and is_local(name) else model.get("config")
    if not isinstance(config, dict):
        return None
    # A multimodal model keeps the shape of its text part in a section.
    text = config.get("text_config")
    shape = config | text if isinstance(text, dict) else config
    depth = next((shape[key] for key in DEPTH_KEYS if key in shape), None)
    return depth if isinstance(depth, int) and depth > 0 else None


def local_config(folder: str) -> Any:
    """Return what the `config.json` of a model's folder holds, None where it cannot be read: loading the
    model says why.
    """
    try:
        return parse_json((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ParseError):
        return None


@dataclass(frozen=True)
class Given:
    """The settings that were given in addition to the preset's file, and how a message names each."""

    labels: Mapping[str, str] | None
    """By dotted path, what a form calls a setting; None where settings come from the command line's
    `--set`.
    """
    paths: set[str] = field(default_factory=set)

    def name(self, where: str) -> str:
        """Return what a message calls the setting at a dotted path."""
        if self.labels is None:
            return f"--set {shortened(where)}"
        label = self.labels.get(where)
        return f"{label}, {shortened(where)}" if label else shortened(where)

    def covers(self, where: str) -> bool:
        """Return whether the value at a dotted path, or a part of it, was given."""
        return any(
            where == key or key.startswith(f"{where}.") or where.startswith(f"{key}.") for key in self.paths
        )


def override(content: dict[str, Any], change: str, labels: Mapping[str, str] | None = None) -> str:
    """Write one `key.path=value` into the raw preset and return its path; the key is checked later.

    `labels` say what a form calls a setting, by its dotted path.
    """
    path, separator, value = change.partition("=")
    keys = path.strip().split(".")
    label = (labels or {}).get(".".join(keys))
    option = "--set " if labels is None else ""  # a form has fields, and lines for other settings
    told = f"{label} ({shown(value)})" if label else f'{option}"{shortened(change)}"'
    if not separator or not all(keys):
        raise UserError(
            f"{told} is not of the form key.path=value, for example {option}rmu.steps=50.", place=path
        )
    if len(keys) > MAX_DEPTH:
        raise UserError(f"{told}: the path has more than {MAX_DEPTH} keys.")
    try:
        given, _ = parse_yaml(value)
    except ParseError as error:
        raise UserError(
            f"{told}: the value is {error.problem if error.is_valid else 'not valid YAML'}."
        ) from error
    node: Any = content
    try:
        for key in keys[:-1]:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        last: Any = int(keys[-1]) if isinstance(node, list) else keys[-1]
        node[last] = given
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f'{told}: the preset has no place "{shortened(path)}".') from error
    return ".".join(keys)


def _complaint(path: Path, tree: yaml.Node, content: Any, error: ValidationError, given: Given) -> str:
    """Return every mistake of a preset in one message, in the order of the file, each with the place of its
    value.
    """
    # A wrong value of a union is reported once a member, with the member's name in the path: the place is
    # what counts.
    found: dict[str, tuple[int, list[str]]] = {}
    of_file = 0
    for problem in error.errors():
        line, place = _locate(tree, content, problem["loc"])
        where = ".".join(place)
        is_given = given.covers(where)
        label = given.name(where) if is_given else f"line {line}: {shortened(where)}"
        of_file += not is_given
        messages = found.setdefault(label, (line, []))[1]
        if (message := _reason(problem)) not in messages:
            messages.append(message)
    lines = [
        f"  {label}: {', or '.join(messages)}"
        for label, (_, messages) in sorted(found.items(), key=lambda item: item[1][0])
    ]
    if len(lines) > MISTAKES_SHOWN:
        lines[MISTAKES_SHOWN:] = [f"  and {len(lines) - MISTAKES_SHOWN:,} more"]
    source = str(path) if of_file else "What was given"
    return f"{source} has {len(found):,} mistake{'s' if len(found) > 1 else ''}:\n" + "\n".join(lines)


def _locate(tree: yaml.Node, content: Any, location: tuple[int | str, ...]) -> tuple[int, list[str]]:
    """Return the 1-based line nearest to a pydantic location, and the location's own keys (union members left
    out).

    `content` is the preset after `--set`, which may hold more than the file's `tree`.
    """
    node: yaml.Node | None = tree
    line, place = tree.start_mark.line + 1, list[str]()
    for part in location:
        if not isinstance(content, dict) and not (isinstance(content, list) and isinstance(part, int)):
            break
        place.append(str(part))
        content = content.get(part) if isinstance(content, dict) else content[int(part)]
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            # The last one counts: in front stand those that a merge key (<<) brought along.
            key, node = next(
                ((key, value) for key, value in reversed(node.value) if key.value == str(part)), (None, None)
            )
            line = key.start_mark.line + 1 if key else line
        else:
            node = None
    return line, place


def _reason(problem: Any) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key. {nearest(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(problem["ctx"]["error"])
    given = problem["input"]
    value = (
        shown(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    )
    message = problem["msg"].replace("Input should be", "should be").partition(" or instance of")[0]
    return f"{message} (it is {value})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at a pydantic location takes."""
    section: Any = Preset
    for part in location:
        is_section = isinstance(section, type) and issubclass(section, Section)
        # Otherwise it is a dict or a list, and what counts is the type of its values.
        section = section.model_fields[str(part)].annotation if is_section else section.__args__[-1]
    return list(section.model_fields)
