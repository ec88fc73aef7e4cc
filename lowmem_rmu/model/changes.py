"""What a saved adapter makes of the tensors of a checkpoint as it is stored: which ones it changes, and into
what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.saved import WEIGHTS, read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights.names import model_parts
from lowmem_rmu.weights.stored import Part, StoredTensor, checkpoint_tensors, stored_tensors

BEFORE, FIRST_FACTOR, SECOND_FACTOR = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""Of the names in a PEFT adapter: before those of modules, and after."""
OTHER_KINDS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "velora_config",
)


class Change(Protocol):
    """What becomes of one tensor, seen as a matrix `(height, width)`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def apply(self, rows: Tensor, first: int) -> Tensor:
        """Return the changed rows in float32; `rows` `(n, width)` are those of the base from row `first`
        on.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """Adds `scaling * b @ a`, with a `(rank, width)` and b `(height, rank)`, by the operations of PEFT's own
    merge.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def delta(self, first: int, last: int) -> Tensor:
        product = self.b[first:last] @ self.a
        return product if self.scaling == 1 else product.mul_(self.scaling)

    def apply(self, rows: Tensor, first: int) -> Tensor:
        return self.delta(first, first + len(rows)).add_(rows)


@dataclass(frozen=True)
class Stacked:
    """A change for every expert, where a checkpoint keeps their matrices below one another in one tensor."""

    experts: Sequence[LowRank]

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.experts[0].shape
        return len(self.experts) * height, width

    def apply(self, rows: Tensor, first: int) -> Tensor:
        height, last = self.experts[0].shape[0], first + len(rows)
        spans = [
            (max(first - start, 0), min(last - start, height)) for start in range(0, self.shape[0], height)
        ]
        deltas = [
            expert.delta(*span) for expert, span in zip(self.experts, spans, strict=True) if span[0] < span[1]
        ]
        return torch.cat(deltas).add_(rows)


@dataclass(frozen=True)
class Whole:
    """Takes the place of the matrix: it was trained itself."""

    matrix: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.height, self.matrix.width

    def apply(self, rows: Tensor, first: int) -> Tensor:
        return self.matrix.rows(first, first + len(rows)).float()


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder: its settings, and its tensors by their names without PEFT's own beginning."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "SavedAdapter":
        """Raise UserError where it is damaged, or no LoRA of the plain kind."""
        config = read_adapter_settings(folder)
        other = (
            [key for key in OTHER_KINDS if config.get(key)]
            if config["peft_type"] == "LORA"
            else [config["peft_type"]]
        )
        if other:
            raise UserError(
                f"The adapter {folder} is no plain LoRA ({other[0]}), so it cannot be merged here.",
                "Load it with PEFT instead.",
            )
        tensors = {
            name.removeprefix(BEFORE): tensor for name, tensor in stored_tensors(folder / WEIGHTS).items()
        }
        return cls(folder, config, tensors)

    @property
    def experts(self) -> dict[str, str]:
        """The fused parameter that is adapted, by the module that holds it."""
        return {name.rpartition(".")[0]: name for name in self.config.get("target_parameters") or ()}

    @property
    def parameters(self) -> dict[str, str]:
        """The name of its tensors without their endings, by the model's parameter that is changed."""
        factored = {name.removesuffix(FIRST_FACTOR) for name in self.tensors if name.endswith(FIRST_FACTOR)}
        whole = {name: name for name in self.tensors if ".lora_" not in name}
        return {self.experts.get(module, f"{module}.weight"): module for module in factored} | whole

    def change(self, part: Part) -> Change:
        """Return the change of a tensor that is this part of the model."""
        name = self.parameters[part.parameter]
        if name in self.tensors:
            return Whole(self.tensors[name])
        if lacking := [
            name + factor for factor in (FIRST_FACTOR, SECOND_FACTOR) if name + factor not in self.tensors
        ]:
            raise UserError(
                f"The adapter {self.folder} is damaged: it lacks {lacking[0]}.",
                "Put it back from a copy.",
            )
        a, b = (self.tensors[name + factor].whole().float() for factor in (FIRST_FACTOR, SECOND_FACTOR))
        rank = self.config["r"]
        if name not in self.experts and not len(a) == b.shape[1] == rank:
            raise UserError(
                f"The adapter {self.folder} does not fit its settings: {name} is of rank {len(a)}, but r is "
                f"{rank}.",
                "Put it back from a copy.",
            )
        scaling = self.config["lora_alpha"] / rank
        if name not in self.experts:
            return LowRank(b.T, a.T, scaling) if part.transposed else LowRank(a, b, scaling)
        # As PEFT lays experts out.
        a, b = (
            a.reshape(-1, rank, a.shape[1]),
            b.reshape(len(b), rank, -1).permute(2, 0, 1),
        )
        if part.transposed:
            a, b = b.mT, a.mT
        if part.expert is None:
            return Stacked([LowRank(*factors, scaling) for factors in zip(a, b, strict=True)])
        return LowRank(a[part.expert], b[part.expert].chunk(part.shares)[part.share], scaling)


def read_changes(folder: Path, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> dict[str, Change]:
    """By the names of the checkpoint's tensors. Raises UserError where the adapter does not fit the
    checkpoint.
    """
    adapter = SavedAdapter.open(folder)
    parts = {
        name: part
        for name, part in _parts(adapter, spec, tensors).items()
        if part.parameter in adapter.parameters
    }
    if missing := adapter.parameters.keys() - {part.parameter for part in parts.values()}:
        raise UserError(
            f"The checkpoint {spec.name} has no tensor of its own for {min(missing)}, which the adapter "
            f"{folder} changes.",
            "Is it still the model that the run was made with? If it is, export the adapter: --format "
            "adapter.",
        )
    changes = {name: adapter.change(parts[name]) for name in sorted(parts)}
    for name, change in changes.items():
        _check_fits(name, change, tensors[name], spec)
    return changes


def _parts(adapter: SavedAdapter, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> dict[str, Part]:
    """Most checkpoints name and lay out their tensors as the model does; for the others the skeleton is
    built.
    """
    if not adapter.experts and adapter.parameters.keys() <= tensors.keys():
        as_named = {name: Part(name) for name in adapter.parameters}
        if all(
            adapter.change(part).shape == (tensors[name].height, tensors[name].width)
            for name, part in as_named.items()
        ):
            return as_named
    return model_parts(spec.skeleton, tensors)


def _check_fits(name: str, change: Change, tensor: StoredTensor, spec: ModelSpec) -> None:
    there = (tensor.height, tensor.width)
    if change.shape != there:
        raise UserError(
            f"The adapter does not fit the checkpoint {spec.name}: it changes {name} as a matrix of "
            f"{change.shape[0]} x {change.shape[1]}, but there it is {there[0]} x {there[1]}.",
            "Give back the model that the run was made with.",
        )


def adapted_digests(folder: Path, spec: ModelSpec, layers: int) -> dict[str, str]:
    """sha256 of the checkpoint's tensors that an adapter changes, by name; all lie in the first layers."""
    tensors = checkpoint_tensors(spec.settings, layers)
    return {name: tensors[name].digest() for name in read_changes(folder, spec, tensors)}
