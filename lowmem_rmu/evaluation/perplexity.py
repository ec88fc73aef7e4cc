"""Held-out text: its loss, for topics that have no questions, and how far the unlearned model's predictions
are from base.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.corpora import Batch, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.statistics import ratio_of_means
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.logits import NOT_FINITE, POSITIONS, head_of, hidden_at, logits_at


@torch.inference_mode()
def text_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[list[int]],
    batch_tokens: int,
    written: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the mean next-token loss in nats/token with its standard error over sequences, its exponential
    (the perplexity), and bits/byte.

    At most `batch_tokens` tokens go through the model at once, padding included. `written` are the bytes of
    the text that are predicted in each sequence, so that models with other tokenizers can be compared;
    without it there are no bits/byte (None).
    """
    sums = sequence_losses(model, tokenizer, sequences, batch_tokens)
    loss, stderr = mean_a_token(sums, sequences)
    if not math.isfinite(loss):
        raise UserError(
            "The model's loss on held-out text is not finite.",
            f"{NOT_FINITE}",
        )
    bits_per_byte = None if written is None else sum(sums) / math.log(2) / max(1, sum(written))
    return {
        "loss": loss,
        "stderr": stderr,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte,
        "tokens": sum(map(len, sequences)) - len(sequences),
        "sequences": len(sequences),
        "sequence_losses": sums,
        "sequence_tokens": [len(each) - 1 for each in sequences],
    }


@torch.inference_mode()
def sequence_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], batch_tokens: int
) -> list[float]:
    """Return the sum of the next-token losses of each sequence, in nats."""
    sums: list[float] = []
    for batch in batches(model, tokenizer, sequences, batch_tokens):
        sums += _sums(batch, _losses(model, batch))
    return sums


@torch.inference_mode()
def divergence(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], batch_tokens: int
) -> dict[str, float]:
    """KL(base || unlearned) of the next token in nats, mean over tokens with its standard error: 0 where both
    predict the same.
    """
    sums: list[float] = []
    for batch in batches(model, tokenizer, sequences, batch_tokens):
        sums += _sums(batch, _divergences(model, batch))
    kl, stderr = mean_a_token(sums, sequences)
    return {"kl": kl, "kl_stderr": stderr}


def batches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], batch_tokens: int
) -> Iterator[Batch]:
    """Yield all sequences in their order, padded on the right, at most `batch_tokens` tokens per batch."""
    size, device = max(1, batch_tokens // max(map(len, sequences))), next(model.parameters()).device
    for start in range(0, len(sequences), size):
        yield pad(sequences[start : start + size], tokenizer.pad_token_id, "right", device)


def _sums(batch: Batch, values: Iterator[Tensor]) -> list[float]:
    """Return the sum of a value a predicted token, for each sequence."""
    counted = batch.is_token[:, 1:]
    placed = torch.zeros(counted.shape, device=counted.device)
    placed[counted] = torch.cat(list(values))
    return placed.sum(1).tolist()


def mean_a_token(sums: list[float], sequences: list[list[int]]) -> tuple[float, float]:
    """Mean a predicted token of sums a sequence, which weigh by their length; the standard error is that of
    the ratio of two means.
    """
    return ratio_of_means(sums, [len(each) - 1 for each in sequences])


def _losses(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """Yield the next-token losses of all tokens but the first ones, row after row, piece by piece."""
    targets = batch.input_ids[:, 1:][batch.is_token[:, 1:]]
    for logits, following in zip(
        logits_at(model, batch.predicting, input_ids=batch.input_ids), targets.split(POSITIONS), strict=True
    ):
        yield cross_entropy(logits, following, reduction="none")


def _divergences(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """Yield the divergence at every position that predicts. The decoder runs once on each side, the head over
    a few positions at a time.

    Two distributions and their product take six times the memory of logits, hence fewer positions than
    elsewhere.
    """
    positions = batch.predicting
    unlearned = hidden_at(model, positions, input_ids=batch.input_ids)
    with base_only(model):
        base = hidden_at(model, positions, input_ids=batch.input_ids)
    for pair in zip(base.split(POSITIONS // 4), unlearned.split(POSITIONS // 4), strict=True):
        before, after = (head_of(model, hidden, input_ids=batch.input_ids).log_softmax(-1) for hidden in pair)
        yield kl_div(after, before, reduction="none", log_target=True).sum(-1)
