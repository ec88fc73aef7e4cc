"""Checkpoints: what a resumed run needs, in one safetensors file, so that no moment leaves half a checkpoint
behind.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.runs.files import replaced
from lowmem_rmu.runs.recorded import differences, with_recorded_defaults
from lowmem_rmu.unlearning.guard import Check

NAME = "state.safetensors"


@dataclass
class Progress:
    """How far a run has come: `step` steps are done. Batches follow from the step alone, and nothing else is
    random.
    """

    step: int = 0
    coefficients: dict[str, float] = field(default_factory=dict)
    """The topics' steering coefficients, once they are known."""
    cached: list[str] = field(default_factory=list)
    """Keys of the hidden-state cache."""
    checks: list[Check] = field(default_factory=list)
    """What the guard has found so far."""


@dataclass
class Metadata:
    """What a checkpoint says of itself."""

    progress: Progress
    numbers: dict[str, int | float]
    """Of the optimizer's state what is no tensor."""
    settings: dict[str, Any]
    sums: dict[str, int] | None = None
    """CRC-32 of each tensor; checkpoints of older versions have none."""


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Trained weights, the optimiser's state a parameter, the progress, and the settings that it belongs
    to.
    """
    learned = trainable(model)
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in learned.items()}
    numbers: dict[str, int] = {}  # a step count may be a plain number
    for index, parameter in enumerate(learned.values()):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                # 8-bit states share theirs.
                tensors[f"optimizer.{index}.{key}"] = value.clone() if key.startswith("qmap") else value
            else:
                numbers[f"optimizer.{index}.{key}"] = value
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {
        "progress": asdict(progress),
        "numbers": numbers,
        "settings": settings,
        "sums": checksums(stored),
    }
    folder.mkdir(exist_ok=True)
    with replaced(folder / NAME, durable=True) as unfinished:
        save_file(stored, unfinished, {key: json.dumps(value) for key, value in about.items()})


@dataclass(frozen=True)
class BestWeights:
    """The trained weights at the guard's best check, in the checkpoint's folder: a file a check, for a
    resumed run may go back to an earlier one.
    """

    folder: Path

    def path(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        stored = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        self.folder.mkdir(exist_ok=True)
        with replaced(self.path(step), durable=True) as unfinished:
            save_file(stored, unfinished, {"sums": json.dumps(checksums(stored))})

    def restore(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Bring the trained weights back to where they were after `step` steps. Raises UserError for a file
        that is damaged or gone.
        """
        file = self.path(step)
        try:
            with safe_open(file, framework="pt") as opened:
                sums = json.loads((opened.metadata() or {})["sums"])
                stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if sums != checksums(stored):
                raise ValueError("the checksums differ")
            for name, tensor in weights.items():
                tensor.data.copy_(stored[name])
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _damaged(file, error) from error

    def keep_only(self, step: int | None) -> None:
        """Remove the files of all other checks."""
        for path in self.folder.glob("best-*.safetensors"):
            if step is None or path != self.path(step):
                path.unlink()


def _damaged(file: Path, error: Exception) -> UserError:
    folder = file.parent
    return UserError(
        f"The checkpoint {file} is damaged ({type(error).__name__}).",
        Fix(
            f"Put it back from a copy, or delete {folder} and train again from the beginning: {{action}}",
            ResumeRun(folder.parent.name),
        ),
    )


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """CRC-32 of each tensor's bytes, so that a checkpoint with flipped bits is not trained on."""
    return {
        name: crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
        for name in sorted(tensors)
    }


def load_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress | None:
    """Bring model and optimiser back to where the checkpoint was made; None where there is none.

    Raises UserError for a checkpoint of other settings, and for a damaged one.
    """
    if not (folder / NAME).is_file():
        return None
    try:
        about, tensors = _read(folder / NAME)
        _check_settings(folder, about.settings, settings)
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                _put_state(states, rest, tensor)
        for name, number in about.numbers.items():
            _put_state(states, name.removeprefix("optimizer."), number)
        for name, parameter in trainable(model).items():
            parameter.data.copy_(tensors[f"weight.{name}"])
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _damaged(folder / NAME, error) from error
    return about.progress


def _read(file: Path) -> tuple[Metadata, dict[str, Tensor]]:
    """Read a checkpoint's metadata and its tensors. Raises ValueError where a tensor is not what was
    written.
    """
    with safe_open(file, framework="pt") as opened:
        texts = opened.metadata() or {}
        about = TypeAdapter(Metadata).validate_python(
            {key: json.loads(value) for key, value in texts.items()}
        )
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if about.sums is not None and about.sums != checksums(tensors):
        raise ValueError("the checksums differ")
    return about, tensors


def _put_state(states: dict[int, dict[str, Any]], name: str, value: Any) -> None:
    index, _, key = name.partition(".")
    states.setdefault(int(index), {})[key] = value


def _check_settings(folder: Path, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
    current = json.loads(json.dumps(settings))
    different = sorted(differences(with_recorded_defaults(made_with), with_recorded_defaults(current)))
    # A renamed run holds its own text in another place.
    if different := [path for path in different if not path.endswith("corpus.source")]:
        raise UserError(
            f"The checkpoint in {folder} was made with other settings: {', '.join(different)}.",
            "Give the same ones, or start a new run.",
        )
