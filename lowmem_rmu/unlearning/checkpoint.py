"""Checkpoints: what a resumed run needs, as safetensors and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_rmu.runs import folder_replaced, write_json


@dataclass
class Progress:
    """How far a run has come: `step` steps are done; `coefficients` are the topics' steering coefficients once they are known."""

    step: int
    coefficients: dict[str, float]


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Adapter weights, AdamW's state a parameter, and the progress; the batches follow from the step alone."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    with folder_replaced(folder) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / "state.safetensors")
        write_json(new / "progress.json", {"step": progress.step, "coefficients": progress.coefficients})


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.AdamW) -> Progress | None:
    """Brings model and optimiser back to where the checkpoint was made; None where there is none."""
    if not (folder / "progress.json").is_file():
        return None
    tensors = load_file(folder / "state.safetensors")
    for name, parameter in trainable(model).items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        state = {key.removesuffix(f".{name}"): value for key, value in tensors.items() if key.endswith(f".{name}")}
        del state["weight"]
        # AdamW keeps its step count on the CPU and its moments beside the parameter.
        optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
    return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
