"""Loss on held-out text, for topics that have no questions."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lowmem_rmu.data.corpora import pad


@torch.inference_mode()
def text_loss(model: nn.Module, sequences: list[list[int]], pad_id: int, batch_size: int = 4) -> dict[str, Any]:
    """Mean next-token loss in nats a token with its standard error over sequences, and its exponential, the perplexity.

    Sequences are weighed by their length; the standard error is that of the ratio of two means.
    """
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    for start in range(0, len(sequences), batch_size):
        batch = pad(sequences[start : start + batch_size], pad_id, "right", device)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
        counted = batch.is_token[:, 1:]
        sums += (losses * counted).sum(1).tolist()
        counts += counted.sum(1).tolist()
    tokens = sum(counts)
    loss = sum(sums) / tokens
    residuals = sum((total - loss * count) ** 2 for total, count in zip(sums, counts, strict=True))
    n = len(sums)
    stderr = math.sqrt(residuals * n / (n - 1)) / tokens if n > 1 else 0.0
    return {"loss": loss, "stderr": stderr, "perplexity": math.exp(loss), "tokens": tokens, "sequences": n}
