"""The preset that a run folder holds, read as the version that wrote it meant it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.folder import RunFolder


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
