"""What a run made of its model's checkpoint: which tensors are others now, and each of them merged, whole or
a few rows at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.export.merge.dequantized import dequantised_weights
from lowmem_rmu.model.changes import Change, read_changes
from lowmem_rmu.model.saved import read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import read_preset
from lowmem_rmu.runs.records import checked_json
from lowmem_rmu.weights.source import locate
from lowmem_rmu.weights.stored import StoredTensor

Base = Literal["original", "dequantised"]
"""What the update is added to: the checkpoint, or what training saw of it (4-bit weights, dequantised)."""


class OtherValues(Protocol):
    """Stands in for the checkpoint's own values of some tensors."""

    @property
    def names(self) -> frozenset[str]: ...

    def of(self, name: str, rows: Tensor, first: int) -> Tensor:
        """Return the values that take the place of `rows` `(n, width)`, which begin at row `first`."""
        ...


@dataclass(frozen=True)
class Update:
    """A checkpoint's tensors, and how a run changed some of them."""

    settings: ModelSettings
    """The model; of one on the Hub, the revision that the run was made with."""
    tensors: Mapping[str, StoredTensor]
    changes: Mapping[str, Change]
    instead: OtherValues | None
    checked: bool
    """Whether the checkpoint was seen to be the run's own: runs of older versions recorded nothing to compare
    it with.
    """
    untied: bool = False
    """Whether the checkpoint stores another head than the embeddings that its config.json ties it to."""

    @property
    def adapted_names(self) -> frozenset[str]:
        """Tensors that are not written as they were."""
        return frozenset(self.changes) | (self.instead.names if self.instead else frozenset())

    def merged(self, name: str, tensor: Tensor, first_row: int = 0) -> Tensor:
        """Return the tensor with the update, in its own shape and dtype: summed in float32 and rounded once.

        `tensor` is the checkpoint's, or some rows of it: `(n, width)`, from `first_row` on. Raises UserError
        where the result is not finite.
        """
        rows = base = tensor.reshape(-1, tensor.shape[-1])
        if self.instead and name in self.instead.names:
            base = self.instead.of(name, rows, first_row)
        result = self.changes[name].apply(base, first_row) if name in self.changes else base
        result = result.to(tensor.dtype)
        # One pass: what is not finite makes the sum so.
        if not torch.isfinite(result.sum(dtype=torch.float32)):
            raise UserError(
                f"With the update {name} holds values that are not finite in "
                f"{str(tensor.dtype).removeprefix('torch.')}: the run failed."
            )
        return result.view(tensor.shape)


def update_of(run: RunFolder, base: Base = "original") -> Update:
    """Raise UserError where the run has no adapter, or where its model is not to be had as it was: missing,
    quantised, or another one.
    """
    adapter, spec = adapter_of(run), ModelSpec.of_preset(read_preset(run))
    _check_unquantised(spec.settings)
    checkpoint = spec.checkpoint()
    changes = read_changes(adapter, spec, checkpoint.tensors)
    checked = _check_same(run, spec.settings, checkpoint.tensors, changes)
    instead = _dequantised(run, spec, checkpoint.tensors) if base == "dequantised" else None
    return Update(spec.settings, checkpoint.tensors, changes, instead, checked, checkpoint.is_untied)


def adapter_of(run: RunFolder) -> Path:
    """Raise UserError where the run has none yet, or it is damaged."""
    if not run.adapter.exists():
        raise UserError(
            f"Run {run.path} has no adapter yet.",
            Fix("Go on with it until it has unlearned: {action}", ResumeRun(run.path.name)),
        )
    read_adapter_settings(run.adapter)
    return run.adapter


def model_settings(run: RunFolder) -> ModelSettings:
    """Return the run's model, pinned to the revision that it was made with."""
    return read_preset(run).model


def _check_unquantised(settings: ModelSettings) -> None:
    try:
        config = locate(settings.name, settings.revision).read_config()
    except UserError as error:
        raise UserError(
            f"{str(error).splitlines()[0]}",
            "Put back the model that the run was made with.",
        ) from error
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise UserError(
            f"The model {settings.name} is quantised already ({method or 'by an unnamed method'}): nothing "
            "can be added to its weights.",
            "Put back the original checkpoint.",
        )


def _check_same(
    run: RunFolder,
    settings: ModelSettings,
    tensors: Mapping[str, StoredTensor],
    changes: Mapping[str, Change],
) -> bool:
    """Return whether it could be checked. Raises UserError where the matrices that the adapter changes are
    not those that the run saw.
    """
    if not run.matrices.exists():
        return False
    recorded = checked_json(
        run.matrices,
        dict[str, str],
        "Delete it to export without the check that the checkpoint is still the same.",
    )
    other = [name for name in changes if tensors[name].digest() != recorded.get(name)]
    if other:
        raise UserError(
            f"The checkpoint {settings.name} is not the one that {run.path} was made with: {other[0]} "
            f"differs{f', and {len(other) - 1} more' if other[1:] else ''}.",
            "Put back the files of then, or run again with those of now.",
        )
    return True


def _dequantised(run: RunFolder, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> OtherValues:
    if spec.settings.quantisation == "none":
        raise UserError(
            f"Run {run.path} was not made in 4-bit: it trained on the original weights.",
            "Leave --base dequantised out.",
        )
    return dequantised_weights(spec, torch.device(run.config["device"]), tensors)
