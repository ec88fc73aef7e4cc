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
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from lowmem_rmu.errors import UserError

# Names of a decoder's list of layers; GPT-2, Falcon and Bloom: h; MPT: blocks.
LAYER_LISTS = (
    "layers",
    "h",
    "blocks",
)


@dataclass(frozen=True)
class Arguments:
    """What the model calls a layer with, after the hidden states: by position (GPT-2) or by name (most
    others).
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class Trunk:
    """What enters the first updated layer: `hidden` `(batch, sequence, hidden)`, and the arguments that each
    layer is called with.
    """

    hidden: Tensor
    layer_arguments: list[Arguments]


class _Recorded(Exception):
    """Ends a forward pass once every updated layer's arguments are known."""


class LayerOutput(Tensor):
    """Hidden states in place of a layer's output: most decoders take that as a tensor, some (Falcon, Bloom)
    as the first item of a tuple.
    """

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's list of layers, whatever wraps it. Raises UserError for an architecture without
    one.
    """
    return _named_layers(model)[1]


def layers_name(model: nn.Module) -> str:
    """Return the name of that list within the decoder: `layers` in most models, `h` in GPT-2 and Falcon."""
    return _named_layers(model)[0]


def _named_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder: nn.Module = inner.get_decoder()
    lists = {name: module for name, module in decoder.named_children() if isinstance(module, nn.ModuleList)}
    for name in LAYER_LISTS:
        if name in lists:
            return name, lists[name]
    raise UserError(f"{type(inner).__name__} is no decoder with a list of layers, which is what RMU steers.")


def can_share_prefix(model: nn.Module) -> bool:
    """Return whether all that the model remembers of a prefix are keys and values, which any row of a batch
    can borrow.

    Layers with a recurrent or convolutional state (Mamba, LFM2) and layers that use another layer's keys
    (Gemma 3n) say no.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner._is_stateful:
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=inner.config).layers
    )


def linear_shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes `(outputs, inputs)` of a layer's linear modules by name; GPT-2's `Conv1D` is one,
    stored transposed.
    """
    return {
        name: module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def run_trunk(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    updated: slice,
    hidden: Tensor | None = None,
) -> Trunk:
    """Run the layers below `updated` without gradients; `updated` ends with the target layer.

    The model's own forward pass prepares masks and position embeddings, so that every architecture gets what
    it needs. With `hidden` (what an earlier run of the same tokens gave) the layers below are left out.
    """
    layers, calls = list(decoder_layers(model)), list[tuple[Tensor, Arguments]]()
    below = layers[: updated.start] if hidden is not None else []

    def passed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.as_subclass(LayerOutput)

    def recorded(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        calls.append((hidden_states, Arguments(positional, named)))
        if len(calls) == updated.stop - updated.start:
            raise _Recorded
        return hidden_states.as_subclass(LayerOutput)

    with (
        torch.no_grad(),
        lent_forward(below, passed_on),
        lent_forward(layers[updated], recorded),
        suppress(_Recorded),
    ):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return Trunk(
        calls[0][0].to(input_ids.device) if hidden is None else hidden, [arguments for _, arguments in calls]
    )


def run_layers(
    model: nn.Module, trunk: Trunk, updated: slice, activation_checkpointing: bool = False
) -> Tensor:
    """Return the activations `(batch, sequence, hidden)` that leave the target layer (before any final
    norm).
    """
    hidden = trunk.hidden
    for layer, arguments in zip(decoder_layers(model)[updated], trunk.layer_arguments, strict=True):
        if activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(layer, hidden, *arguments.positional, use_reentrant=False, **arguments.named)
        else:
            hidden = layer(hidden, *arguments.positional, **arguments.named)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden.to(trunk.hidden.device)  # where it began, should the model lie on several devices


@contextmanager
def lent_forward(layers: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Lend the layers another forward, and give them back their own."""
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
