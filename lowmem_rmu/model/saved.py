"""The folder of a saved adapter, checked before a model is loaded: the same sentence in every verb that takes
an adapter.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from lowmem_rmu.errors import Fix, ResumeRun, UserError, with_more
from lowmem_rmu.runs.records import DIGESTS, check_digest, checked_json, file_digest

CONFIG, WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WHOLE_FORWARD = ("XLORA", "POLY")
"""Kinds that sit in the layers, but take from the model's whole forward pass what they do there."""


@dataclass(frozen=True)
class AdapterSettings:
    """The shape of `adapter_config.json`, as far as every kind of adapter has it."""

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None


@dataclass(frozen=True)
class LoraSettings:
    """The shape of what LoRA has in addition."""

    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`, and check that the whole folder is sound.

    Raises UserError where the folder holds no adapter, its settings or its weights are damaged or not finite,
    the weights are pickled, a file is not the one that the run recorded, or the adapter is of a kind that
    acts outside of the model's layers.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds no adapter.",
            "Run the unlearn stage first.",
        )
    what_next = _what_next(folder)
    settings: dict[str, Any] = checked_json(folder / CONFIG, AdapterSettings, what_next)
    _check_kind(folder, settings)
    if settings["peft_type"] == "LORA":
        checked_json(folder / CONFIG, LoraSettings, what_next)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED_WEIGHTS).is_file():
            raise UserError(
                f"The adapter {folder} holds its weights pickled only ({PICKLED_WEIGHTS}), which is not "
                "read: pickled weights can run code.",
                "Get it as safetensors: load it with PEFT where you trust it, and save it again.",
            )
        raise UserError(
            f"The adapter {folder} lacks its weights, {WEIGHTS}.",
            what_next,
        )
    _check_recorded(folder, what_next)
    _check_finite(folder / WEIGHTS, what_next)
    return settings


def adapter_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of an adapter's files, as `digests.json` in a run folder has them."""
    return {f"adapter/{name}": file_digest(folder / name) for name in (CONFIG, WEIGHTS)}


def _what_next(folder: Path) -> str | Fix:
    run = folder.parent
    if folder.name == "adapter" and (run / "config.json").is_file():
        advice = (
            f"Put it back from a copy, or delete {folder} and have it made again from the checkpoint: "
            "{action}"
        )
        return Fix(advice, ResumeRun(run.name))
    return "Download or copy the adapter again."


def _check_kind(folder: Path, settings: dict[str, Any]) -> None:
    kind = settings["peft_type"]
    if kind == "LORA" and not settings.get("alora_invocation_tokens"):
        return
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # large, and only rare kinds need it
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if tuner is None:
        raise UserError(
            f'The adapter {folder} is of the kind "{kind}", which PEFT does not know here.',
            f"Check peft_type in {CONFIG}, or update PEFT.",
        )
    if kind == "LORA" or kind in WHOLE_FORWARD or not issubclass(tuner, BaseTuner):
        named = "LORA with alora_invocation_tokens" if kind == "LORA" else str(kind)
        raise UserError(
            f"The adapter {folder} is of the kind {named}, which acts on the prompt or the whole forward "
            "pass, not in the layers alone: here it would have no effect.",
            "Give an adapter that changes layers: LoRA, DoRA, IA3, LoHa and others.",
        )


def _check_recorded(folder: Path, what_next: str | Fix) -> None:
    """Hold the adapter of a run against the digests that the run recorded; older runs have none."""
    digests = folder.parent / DIGESTS
    if folder.name != "adapter" or not digests.is_file():
        return
    recorded = checked_json(digests, dict[str, str], "Delete it to use the adapter without this check.")
    on_purpose = f"If you changed it on purpose, delete {digests}."
    for name in (CONFIG, WEIGHTS):
        check_digest(folder / name, recorded.get(f"adapter/{name}"), with_more(what_next, on_purpose))


def _check_finite(file: Path, what_next: str | Fix) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise UserError(
                        f"{file} holds values that are not finite, in {name}: the training failed, or the "
                        "file is damaged.",
                        what_next,
                    )
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged or cut short: {error}.",
            what_next,
        ) from error
