"""The decoder's layers: running the untouched ones once, and the updated ones as often as needed.

    tokens -> [layers below the first updated one] -> Trunk -> [first updated .. target layer] -> activations
               no gradients, shared by all paths               once frozen, once updated

Nothing above the target layer is run and no logits are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_rmu.errors import UserError


@dataclass(frozen=True)
class Trunk:
    """What enters the first updated layer: `hidden` `(batch, sequence, hidden)`, and the arguments that each layer is called with."""

    hidden: Tensor
    layer_arguments: list[dict[str, Any]]

    def first(self, samples: int | None) -> "Trunk":
        """The same for the batch's first samples alone; None: for all. (What has one row for the whole batch keeps it.)"""

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(each) for each in value)
            return value[:samples] if isinstance(value, Tensor) and value.dim() > 1 else value

        return Trunk(self.hidden[:samples], [{name: cut(value) for name, value in arguments.items()} for arguments in self.layer_arguments])


class _Recorded(Exception):
    """Ends a forward pass once every updated layer's arguments are known."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers, whatever wraps it. Raises UserError for an architecture without one."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = getattr(inner.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(inner).__name__} is no decoder with a list of layers, which is what RMU steers.")
    return layers


def is_expert_weight(name: str, parameter: Tensor) -> bool:
    """Whether a parameter holds one matrix of every expert of a mixture: transformers keeps them fused, `(experts, out, in)`."""
    return parameter.dim() == 3 and ".experts." in f".{name}"


def expert_shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """The fused weights of a decoder layer's experts by name (such as `mlp.experts.down_proj`), in 4-bit or not."""
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters() if is_expert_weight(name, parameter)}
    for name, module in layer.named_modules():
        if isinstance(module, Bnb4bitParametrization):  # mlp.experts.parametrizations.down_proj.0
            shapes[name.replace("parametrizations.", "").rpartition(".")[0]] = module.quant_state.shape
    return shapes


def run_trunk(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, updated: slice, hidden: Tensor | None = None) -> Trunk:
    """Runs the layers below `updated` without gradients; `updated` ends with the target layer.

    The model's own forward pass prepares masks and position embeddings, so that every architecture gets what it needs.
    With `hidden` (what an earlier run of the same tokens gave) the layers below are left out.
    """
    layers, calls = list(decoder_layers(model)), list[tuple[Tensor, dict[str, Any]]]()
    below = layers[: updated.start] if hidden is not None else []

    def passed_on(hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def recorded(hidden_states: Tensor, **arguments: Any) -> Tensor:
        calls.append((hidden_states, arguments))
        if len(calls) == updated.stop - updated.start:
            raise _Recorded
        return hidden_states

    with torch.no_grad(), lent_forward(below, passed_on), lent_forward(layers[updated], recorded), suppress(_Recorded):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return Trunk(calls[0][0].to(input_ids.device) if hidden is None else hidden, [arguments for _, arguments in calls])


def run_layers(model: nn.Module, trunk: Trunk, updated: slice, activation_checkpointing: bool = False) -> Tensor:
    """The activations `(batch, sequence, hidden)` that leave the target layer (before any final norm)."""
    hidden = trunk.hidden
    for layer, arguments in zip(decoder_layers(model)[updated], trunk.layer_arguments, strict=True):
        if activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(layer, hidden, use_reentrant=False, **arguments)
        else:
            hidden = layer(hidden, **arguments)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden.to(trunk.hidden.device)  # where it began, should the model lie on several devices


@contextmanager
def lent_forward(layers: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Lends the layers another forward, and gives them back their own."""
    own = [layer.__dict__.get("forward") for layer in layers]  # set where accelerate has hooked the layer
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
