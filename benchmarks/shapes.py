"""Models of any shape with random weights: what a step costs in time and memory does not depend on what the
weights are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from zlib import crc32

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_rmu.model.loading import build_model, skeleton
from lowmem_rmu.weights.shards import freed_memory_returned, is_needed


@dataclass(frozen=True)
class RandomWeight:
    """A weight that is made on `device` when it is asked for, `weight[...]`: norms 1, biases 0, matrices
    normal with std 0.02.
    """

    name: str
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, _: EllipsisType) -> Tensor:
        weight = torch.empty(self.shape, device=self.device, dtype=self.dtype)
        if len(self.shape) == 1:
            return weight.fill_(0 if self.name.endswith("bias") else 1)
        return weight.normal_(
            std=0.02, generator=torch.Generator(self.device).manual_seed(crc32(self.name.encode()))
        )


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    layers: int | None,
    quantisation: str,
    dtype: torch.dtype,
    unquantised: Sequence[str] = (),
) -> PreTrainedModel:
    """Return a model of the config's shape, built as a checkpoint is loaded: its first `layers` layers
    without a head, or the whole.
    """
    parameters = skeleton(config).named_parameters()
    weights = {
        name: RandomWeight(name, parameter.shape, device, dtype)
        for name, parameter in parameters
        if is_needed(name, layers)
    }
    with freed_memory_returned():
        return build_model(config, weights, device, layers, quantisation, dtype, unquantised)[0]
