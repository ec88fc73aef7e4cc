"""Loss on held-out text, for topics that have no questions."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowmem_rmu.data.corpora import Batch, pad
from lowmem_rmu.model.logits import POSITIONS, logits_at


@torch.inference_mode()
def text_loss(model: nn.Module, sequences: list[list[int]], pad_id: int, batch_tokens: int) -> dict[str, Any]:
    """Mean next-token loss in nats a token with its standard error over sequences, and its exponential, the perplexity.

    At most `batch_tokens` tokens go through the model at once, padding included. Sequences are weighed by their length; the standard
    error is that of the ratio of two means.
    """
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    batch_size = max(1, batch_tokens // max(map(len, sequences)))
    for start in range(0, len(sequences), batch_size):
        batch = pad(sequences[start : start + batch_size], pad_id, "right", device)
        counted = batch.is_token[:, 1:]
        losses = torch.zeros(counted.shape, device=device)
        losses[counted] = torch.cat(list(_losses(model, batch)))
        sums += losses.sum(1).tolist()
        counts += counted.sum(1).tolist()
    tokens = sum(counts)
    loss = sum(sums) / tokens
    residuals = sum((total - loss * count) ** 2 for total, count in zip(sums, counts, strict=True))
    n = len(sums)
    stderr = math.sqrt(residuals * n / (n - 1)) / tokens if n > 1 else 0.0
    return {"loss": loss, "stderr": stderr, "perplexity": math.exp(loss), "tokens": tokens, "sequences": n}


def _losses(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """The next-token losses of all that follows a first token, row after row, piece by piece."""
    predicting = torch.zeros_like(batch.is_token)
    predicting[:, :-1] = batch.is_token[:, 1:]
    targets = batch.input_ids[:, 1:][batch.is_token[:, 1:]]
    for logits, following in zip(logits_at(model, predicting, input_ids=batch.input_ids), targets.split(POSITIONS), strict=True):
        yield cross_entropy(logits, following, reduction="none")
