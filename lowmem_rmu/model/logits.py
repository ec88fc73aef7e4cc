"""Logits of the positions that are asked for: the decoder runs once, the head over a few positions at a time.

    tokens -> [decoder] -> hidden states -> positions asked for -> [head] -> logits, 128 positions at a time

The logits of a whole batch can be larger than the model: 4 x 512 positions of 128,000 tokens take 1 GiB in
float32, and each step of a loss takes as much again. On a CPU in bfloat16, a head over a slice of the batch
would even copy its weights once a row.
"""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowmem_rmu.model.layers import lent_forward

NOT_FINITE = (
    "Its numbers overflow, or it is damaged. In float16 try model.dtype=bfloat16 or float32;"
    " else check the checkpoint and the adapter."
)
"""What to do about a model whose logits are not finite."""
POSITIONS = 128


class Decoded(BaseModelOutputWithPast):
    """Stand in for any decoder's output: fields that only some decoders have (`router_logits`, `cache`) are
    None.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Iterator[Tensor]:
    """Yield logits `(up to 128, vocabulary)` in float32 where `positions` `(batch, sequence)` is True, piece
    by piece in their order.
    """
    for hidden in hidden_at(model, positions, **inputs).split(POSITIONS):
        yield head_of(model, hidden, **inputs)


def hidden_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """Return the decoder's outputs `(count, hidden)` where `positions` is True. Keys and values are not kept;
    those that are passed in are used.
    """
    hidden: Tensor = _inner(model).get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden[positions.to(hidden.device)]


def head_of(model: nn.Module, hidden: Tensor, **inputs: Any) -> Tensor:
    """Return the model's own forward over what its decoder gave, so that whatever it does to its logits
    (scaling, capping) is done.
    """
    inner = _inner(model)
    decoded = Decoded(last_hidden_state=hidden[None])
    with lent_forward([inner.get_decoder()], lambda *_, **__: decoded):
        logits: Tensor = inner(**inputs, use_cache=False).logits[0]
    # A model on several devices ends on another than it began.
    return logits.float().to(inputs["input_ids"].device)


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
