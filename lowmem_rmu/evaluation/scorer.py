"""Log-probabilities of given tokens after given contexts; what many contexts begin with is read once.

    few-shot prefix -> [decoder] -> keys and values, kept once  ---+
    rests of the prompts, padded on the right -> [decoder] <-------+ -> last positions -> [head] -> tokens

The prefix is the longest one that the prompts' *token ids* share: its text tokenised alone ends in other
tokens at the seam.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lowmem_rmu.config.schema import SMALLEST_BATCH
from lowmem_rmu.data.corpora import pad
from lowmem_rmu.memory.advice import is_out_of_memory
from lowmem_rmu.model.logits import logits_at

LARGEST_BATCH = 32768  # tokens, of the batches that are tried out
PROBE_ROW = 128  # tokens of a prompt in that trial, about those of a question
GAIN = 1.05  # a larger batch must be so much faster
# So many tokens of a shared prefix take the memory of one other: their keys and values in one layer at a
# time.
PREFIX_COST = 6
WORTHWHILE = 1 / 8  # of a prompt: a shorter prefix saves less than the mask costs that it needs


@dataclass(frozen=True)
class Request:
    """Token ids, and `wanted[position][alternative]`: for each of their last positions the next token in each
    of the alternatives.

    What is asked for is the log-probability of each alternative: the sum over its positions.
    """

    ids: tuple[int, ...]
    wanted: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RequestBatch:
    """Requests, by their numbers, that go through the model together after their common prefix (a count of
    tokens).
    """

    prefix: int
    numbers: tuple[int, ...]


def plan_batches(
    requests: Sequence[Request],
    groups: Iterable[Sequence[int]],
    batch_tokens: int,
    shares_prefix: bool = True,
) -> list[RequestBatch]:
    """Return batches of like length, the longest first, within `batch_tokens`. Requests of a group, such as a
    subject, share a prefix.

    Groups that fill no batch and share little are put together. The plan is a function of its arguments, so
    that a part of it can be computed elsewhere or later with the same result.
    """
    if not shares_prefix:
        return list(
            _batches(requests, [number for group in groups for number in group], batch_tokens, shares_prefix)
        )
    alone: list[list[int]] = []
    together: list[int] = []
    for group in groups:
        prefix = _common_prefix([requests[number] for number in group])
        rest = sum(len(requests[number].ids) - prefix for number in group)
        if rest >= batch_tokens or prefix * len(group) > rest:
            alone.append(list(group))
        else:
            together += group
    return [batch for group in [*alone, together] for batch in _batches(requests, group, batch_tokens)]


def _batches(
    requests: Sequence[Request], group: list[int], batch_tokens: int, shares_prefix: bool = True
) -> Iterator[RequestBatch]:
    if not group:
        return
    prefix = _common_prefix([requests[number] for number in group]) if shares_prefix else 0
    if len(group) == 1 or prefix < WORTHWHILE * len(requests[group[0]].ids):
        prefix = 0
    batch: list[int] = []
    for number in sorted(group, key=lambda number: -len(requests[number].ids)):
        if batch and (len(batch) + 1) * cost(requests[batch[0]], prefix) > batch_tokens:
            yield RequestBatch(prefix, tuple(batch))
            batch = []
        batch.append(number)
    yield RequestBatch(prefix, tuple(batch))


def cost(request: Request, prefix: int) -> int:
    """Return tokens that a row of this length takes of a batch."""
    return len(request.ids) - prefix + prefix // PREFIX_COST


def _common_prefix(requests: list[Request]) -> int:
    """Return tokens that all requests begin with, and after which every position that is asked for still
    comes.
    """
    room = min(len(request.ids) - len(request.wanted) for request in requests)
    return min(room, len(commonprefix([request.ids for request in requests])))


class Scorer:
    """Scores requests on a model as it stands: in eval mode, its adapter on or off."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.device = next(model.parameters()).device
        self.most: int | None = None
        """Tokens a batch may have, once one of more has run out of memory."""
        self._prefix: tuple[tuple[int, ...], DynamicCache | None] = ((), None)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], batch: RequestBatch) -> list[list[float]]:
        """Return the log-probabilities of each request's alternatives. The batch is halved where memory does
        not suffice.
        """
        tokens = len(batch.numbers) * max(cost(requests[number], batch.prefix) for number in batch.numbers)
        if self.most is None or tokens <= self.most or len(batch.numbers) == 1:
            try:
                return self._score([requests[number] for number in batch.numbers], batch.prefix)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch.numbers) == 1:
                    raise
                self.most = tokens // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        half = len(batch.numbers) // 2
        parts = [
            RequestBatch(batch.prefix, numbers) for numbers in (batch.numbers[:half], batch.numbers[half:])
        ]
        return [row for part in parts for row in self.score(requests, part)]

    def _score(self, requests: list[Request], prefix: int) -> list[list[float]]:
        cache = self._read_prefix(requests[0].ids[:prefix])
        batch = pad([list(request.ids[prefix:]) for request in requests], self.pad_id, "right", self.device)
        asked = torch.zeros_like(batch.is_token)
        for row, request in enumerate(requests):
            end = len(request.ids) - prefix
            asked[row, end - len(request.wanted) : end] = True
        wanted = [ids for request in requests for ids in request.wanted]
        found: list[list[float]] = []
        for logits in logits_at(self.model, asked, input_ids=batch.input_ids, past_key_values=cache):
            found += _pick(logits, wanted[len(found) : len(found) + len(logits)])
        rows = iter(found)
        return [
            [sum(each) for each in zip(*(next(rows) for _ in request.wanted), strict=True)]
            for request in requests
        ]

    def _read_prefix(self, ids: tuple[int, ...]) -> DynamicCache | None:
        """Return keys and values of the prefix, kept until another one is asked for."""
        if not ids:
            return None
        if self._prefix[0] != ids:
            self._prefix = ((), None)  # one at a time
            inner: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            cache = DynamicCache()
            inner.get_decoder()(
                input_ids=torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True
            )
            layers: Any = cache.layers
            cache.layers = [_SharedLayer(layer.keys, layer.values) for layer in layers]
            self._prefix = (ids, cache)
        return self._prefix[1]


class _SharedLayer(DynamicLayer):
    """Keys and values of a prefix, lent to every row of a batch; what follows it is not kept, so that one
    layer's copy lives at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([ours.expand(len(new), -1, -1, -1), new], dim=-2) for ours, new in pairs)
        return keys, values


def _pick(logits: Tensor, wanted: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """Return the log-probabilities of each position's own ids. The logits `(positions, vocabulary)` are
    overwritten.
    """
    normaliser = logits.logsumexp(-1).tolist()
    counts = [len(ids) for ids in wanted]
    rows = torch.arange(len(wanted), device=logits.device).repeat_interleave(
        torch.tensor(counts, device=logits.device)
    )
    chosen = logits[
        rows, torch.tensor([each for ids in wanted for each in ids], device=logits.device)
    ].tolist()
    values = iter(chosen)
    return [
        [next(values) - total for _ in range(count)] for total, count in zip(normaliser, counts, strict=True)
    ]


def find_batch_tokens(model: nn.Module, pad_id: int) -> int:
    """Return the batch size in tokens from which on larger ones are hardly faster, or do not fit: found on
    made-up prompts.
    """
    scorer = Scorer(model, pad_id)
    chosen, best, tokens = SMALLEST_BATCH, 0.0, SMALLEST_BATCH
    scorer.score(*_made_up(SMALLEST_BATCH, pad_id))  # the first batch of all also makes buffers
    while tokens <= LARGEST_BATCH:
        started = perf_counter()
        scorer.score(*_made_up(tokens, pad_id))
        speed = tokens / (perf_counter() - started)
        if scorer.most is not None or speed < GAIN * best:
            break
        chosen, best, tokens = tokens, speed, 2 * tokens
    return chosen


def _made_up(tokens: int, pad_id: int) -> tuple[list[Request], RequestBatch]:
    request = Request((pad_id,) * PROBE_ROW, ((pad_id,),))
    return [request] * (tokens // PROBE_ROW), RequestBatch(0, tuple(range(tokens // PROBE_ROW)))
