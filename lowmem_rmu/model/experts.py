"""The experts of a mixture. transformers keeps the matrices of all experts of a layer fused in one parameter.

A fused parameter `(experts, out, in)` is no linear module: it is quantized, counted and adapted in
separate ways, all of which are here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from lowmem_rmu.model.layers import decoder_layers


def is_expert_weight(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter holds one matrix of every expert of a mixture: transformers keeps them
    fused, `(experts, out, in)`.
    """
    return parameter.dim() == 3 and ".experts." in f".{name}"


def expert_shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """Return the fused weights of a decoder layer's experts by name (such as `mlp.experts.down_proj`), in
    4-bit or not.
    """
    shapes = {
        name: parameter.shape
        for name, parameter in layer.named_parameters()
        if is_expert_weight(name, parameter)
    }
    for name, module in layer.named_modules():
        if isinstance(module, Bnb4bitParametrization):  # mlp.experts.parametrizations.down_proj.0
            shapes[name.replace("parametrizations.", "").rpartition(".")[0]] = module.quant_state.shape
    return shapes


def expert_parameters(model: nn.Module, layer_indices: Sequence[int], names: Sequence[str]) -> set[str]:
    """Return the full names of the fused weights called one of `names` (such as `down_proj`) in these layers.

    PEFT takes them by their full names, as its `layers_to_transform` does not hold for parameters.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found = set()
    for index in layer_indices:
        for name in expert_shapes(layers[index]):
            if name.rpartition(".")[2] in names:
                found.add(f"{prefix}.{index}.{name}")
    return found


class ExpertAdapter(ParamWrapper):
    """PEFT's adapter on fused experts, made removable from a weight that bitsandbytes keeps in 4-bit."""

    def _remove_parametrizations(self) -> None:
        """Remove the adapter after a pass.

        PEFT 0.21 looks for a class that it no longer puts there: its adapter stays on, and the next pass adds
        it again.
        """
        parametrizations: Any = self.get_base_layer().parametrizations
        on_weight = parametrizations[self.parameter_name]
        # The first parametrization is the dequantization, the last one the adapter.
        if len(on_weight) > 1:
            del on_weight[-1]
        else:
            super()._remove_parametrizations()


def with_removable_experts(model: PeftModel) -> PeftModel:
    """Return the model with its adapters on experts turned into `ExpertAdapter`."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.__class__ = ExpertAdapter
    return model
