"""How many weights a model has, and where: counted on the model itself, which may be on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lowmem_rmu.config.schema import Rmu
from lowmem_rmu.model.experts import expert_shapes
from lowmem_rmu.model.layers import decoder_layers, linear_shapes


class Linear(NamedTuple):
    """A linear module of a decoder layer, or so many experts' matrices."""

    inputs: int
    outputs: int
    in_mlp: bool
    matrices: int


@dataclass(frozen=True)
class LayerWeights:
    """Parameters of one decoder layer. Layers of one model can differ: dense below, a mixture of experts
    above (DeepSeek-V3).
    """

    linear: int
    other: int
    largest_linear: int
    experts: int
    """Of its mixture of experts, which are among `linear`: dequantised all at once."""
    intermediate: int
    """Width of the MLP for one token: of a mixture, that of all experts which a token takes."""
    adapted: tuple[Linear, ...]
    """What an adapter changes where the layer has one."""


@dataclass(frozen=True)
class Weights:
    """Parameters by where they live: decoder layers, `embedding`, `head` (0 where it is tied)."""

    by_layer: tuple[LayerWeights, ...]
    embedding: int
    head: int

    @property
    def layers(self) -> int:
        return len(self.by_layer)

    @property
    def largest_linear(self) -> int:
        return max(layer.largest_linear for layer in self.by_layer)

    @property
    def experts(self) -> int:
        """The largest mixture of experts of a layer."""
        return max(layer.experts for layer in self.by_layer)

    def total(self) -> int:
        return self.up_to(self.layers) + self.head

    def up_to(self, layers: int) -> int:
        """Count the parameters of a model that is cut to its first layers."""
        return sum(layer.linear + layer.other for layer in self.by_layer[:layers]) + self.embedding

    def learning(self, rmu: Rmu) -> int:
        """Return parameters that learn."""
        total = 0
        for module in (module for index in rmu.adapter_layers for module in self.by_layer[index].adapted):
            low_rank = rmu.rank * (module.inputs + module.outputs)
            total += module.matrices * (
                module.inputs * module.outputs if rmu.trainable == "weights" else low_rank
            )
        return total

    def adapted(self, rmu: Rmu) -> tuple[Linear, ...]:
        """Return the adapted modules of the adapter layer where they are widest."""
        layers = [self.by_layer[index].adapted for index in rmu.adapter_layers]
        return max(layers, key=lambda adapted: sum(module.inputs + module.outputs for module in adapted))


def count_weights(model: PreTrainedModel, modules: Sequence[str]) -> Weights:
    """Count the weights of a model, which may be on the meta device. Modules named in `modules` are those
    that have adapters.
    """
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()
    embedding = embeddings.weight.numel()
    return Weights(
        by_layer=tuple(
            _count_layer(layer, modules, config.get_text_config()) for layer in decoder_layers(model)
        ),
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
    )


def _count_layer(layer: nn.Module, modules: Sequence[str], config: Any) -> LayerWeights:
    hidden, experts = config.hidden_size, expert_shapes(layer)
    shapes = linear_shapes(layer) | experts
    linear = sum(shape.numel() for shape in shapes.values())
    # A name that experts have means them alone, not the shared expert.
    of_experts = {name.rpartition(".")[2] for name in experts}
    adapted = {
        name: shape
        for name, shape in shapes.items()
        if (leaf := name.rpartition(".")[2]) in modules and (name in experts or leaf not in of_experts)
    }
    # Outside of attention, what leads to or from the hidden size has the MLP's width on its other side. Fused
    # gates have it twice.
    widths = [hidden]
    for name, shape in shapes.items():
        if hidden in shape[-2:] and not _in_attention(name) and "gate" not in name:
            width = shape[-1] * shape[-2] // hidden
            widths.append(width * getattr(config, "num_experts_per_tok", 1) if name in experts else width)
    return LayerWeights(
        linear=linear,
        other=sum(parameter.numel() for parameter in layer.parameters()) - linear,
        largest_linear=max((shape.numel() for shape in shapes.values()), default=0),
        experts=sum(shape.numel() for shape in experts.values()),
        intermediate=max(widths),
        adapted=tuple(
            Linear(shape[-1], shape[-2], not _in_attention(name), prod(shape[:-2]))
            for name, shape in adapted.items()
        ),
    )


def _in_attention(module_name: str) -> bool:
    return "attn" in module_name or "attention" in module_name
