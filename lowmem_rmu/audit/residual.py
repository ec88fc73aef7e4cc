"""The residual stream: what leaves the decoder's layers, read or changed while the model works."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowmem_rmu.audit.context import Audited
from lowmem_rmu.model.layers import decoder_layers


def layer_count(audited: Audited) -> int:
    """Return the number of layers of the model, which need not be in memory."""
    return audited.sides.base.layer_count


def spread(first: int, last: int, most: int) -> list[int]:
    """At most `most` numbers (two or more) from `first` to `last`, both among them, evenly spaced."""
    count = min(most, last - first + 1)
    return [first + number * (last - first) // max(1, count - 1) for number in range(count)]


@contextmanager
def leaving(
    model: nn.Module, layers: Sequence[int], see: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within, `see(layer, hidden)` hears what leaves each of the layers, `(batch, sequence, hidden)`; what it
    returns, if anything, continues instead.
    """

    def hook(layer: int) -> Callable[..., Any]:
        def called(module: nn.Module, inputs: Any, output: Any) -> Any:
            changed = see(layer, output[0] if isinstance(output, tuple) else output)
            return (
                output
                if changed is None
                else (changed, *output[1:])
                if isinstance(output, tuple)
                else changed
            )

        return called

    there = decoder_layers(model)
    hooks = [there[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
