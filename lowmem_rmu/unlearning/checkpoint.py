"""Checkpoints: what a resumed run needs, in one safetensors file, so that no moment leaves half a checkpoint behind."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import differences
from lowmem_rmu.runs import replaced

NAME = "state.safetensors"


@dataclass
class Progress:
    """How far a run has come: `step` steps are done. Batches follow from the step alone, and nothing else is random."""

    step: int = 0
    coefficients: dict[str, float] = field(default_factory=dict)
    """The topics' steering coefficients, once they are known."""
    cached: list[str] = field(default_factory=list)
    """Keys of the hidden-state cache."""


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, progress: Progress, settings: dict[str, Any]) -> None:
    """Trained weights, the optimiser's state a parameter, the progress, and the settings that it belongs to."""
    learned = trainable(model)
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in learned.items()}
    numbers: dict[str, int] = {}  # a step count may be a plain number
    for index, parameter in enumerate(learned.values()):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.clone() if key.startswith("qmap") else value  # 8-bit states share theirs
            else:
                numbers[f"optimizer.{index}.{key}"] = value
    about = {"progress": asdict(progress), "numbers": numbers, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / NAME, durable=True) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {key: json.dumps(value) for key, value in about.items()})


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Progress | None:
    """Brings model and optimiser back to where the checkpoint was made; None where there is none.

    Raises UserError for a checkpoint of other settings.
    """
    if not (folder / NAME).is_file():
        return None
    with safe_open(folder / NAME, framework="pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
        _check_settings(folder, about["settings"], settings)
        states: dict[int, dict[str, Any]] = {}
        for name in file.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                _put_state(states, rest, file.get_tensor(name))
        for name, number in about["numbers"].items():
            _put_state(states, name.removeprefix("optimizer."), number)
        for name, parameter in trainable(model).items():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**about["progress"])


def _put_state(states: dict[int, dict[str, Any]], name: str, value: Any) -> None:
    index, _, key = name.partition(".")
    states.setdefault(int(index), {})[key] = value


def _check_settings(folder: Path, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
    different = sorted(differences(made_with, json.loads(json.dumps(settings))))
    if different := [path for path in different if not path.endswith("corpus.source")]:  # a renamed run holds its own text in another place
        raise UserError(f"The checkpoint in {folder} was made with other settings: {', '.join(different)}.\nGive the same ones, or start a new run.")
