"""The weights that a run in 4-bit was trained on: those of the checkpoint, quantised as for the run and
dequantised.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod

import torch
from torch import Tensor

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.quantization import BLOCK, as_quantised, kept_constants, quantised_parameters
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights.names import model_parts
from lowmem_rmu.weights.stored import Part, StoredTensor


def dequantised_weights(
    spec: ModelSpec, device: torch.device, tensors: Mapping[str, StoredTensor]
) -> "Dequantised":
    """Return the values of all weights that are 4-bit when the model is loaded on the device, in the
    precision that it computes in.
    """
    quantised = quantised_parameters(spec.skeleton, spec.trained_modules)
    parts = {
        name: part
        for name, part in model_parts(spec.skeleton, tensors).items()
        if part.parameter in quantised
    }
    return Dequantised(tensors, parts, spec.dtype(device))


@dataclass(frozen=True)
class Dequantised:
    """`parts` are the tensors that were quantised; those of one parameter were so together, for double
    quantisation averages over all of it.
    """

    tensors: Mapping[str, StoredTensor]
    parts: Mapping[str, Part]
    dtype: torch.dtype
    """Of the run: what is quantised is cast to it before, and dequantised into it."""
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.parts)

    def of(self, name: str, rows: Tensor, first: int) -> Tensor:
        """`rows` `(n, width)` of the tensor from row `first` on, which must begin with a block of
        quantisation; in the run's dtype.
        """
        start, left_over = divmod(self._before(name) + first * rows.shape[1], BLOCK)
        if left_over:
            raise ValueError(f"row {first} of {name} does not begin with a block")
        blocks = -(-rows.numel() // BLOCK)
        return as_quantised(
            rows.to(self.dtype), self._constants(self.parts[name].parameter)[start : start + blocks]
        )

    def _together(self, parameter: str) -> list[StoredTensor]:
        """Return the tensors of a parameter in their order."""
        names = [name for name, part in self.parts.items() if part.parameter == parameter]
        return [
            self.tensors[name]
            for name in sorted(names, key=lambda name: (self.parts[name].expert or 0, self.parts[name].share))
        ]

    def _before(self, name: str) -> int:
        """Return values of the parameter before the tensor's first."""
        together = self._together(self.parts[name].parameter)
        return sum(prod(tensor.shape) for tensor in takewhile(lambda tensor: tensor.name != name, together))

    def _constants(self, parameter: str) -> Tensor:
        """Return a checkpoint's order goes to and fro between the two fused weights of a layer's experts:
        those of two are kept.
        """
        if parameter not in self._kept:
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[parameter] = kept_constants(self._pieces(parameter))
        return self._kept[parameter]

    def _pieces(self, parameter: str) -> Iterator[Tensor]:
        together = self._together(parameter)
        if any(prod(tensor.shape) % BLOCK for tensor in together[:-1]):
            raise UserError(
                f"The experts of {parameter} share blocks of {BLOCK} weights when they are quantised.",
                "Leave --base dequantised out.",
            )
        for tensor in together:
            for span in tensor.pieces():
                yield tensor.rows(*span).to(self.dtype)
