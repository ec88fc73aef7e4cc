"""The hooks on the residual stream: every pass is seen or changed, with and without a cache, and nothing stays behind."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.audit.residual import leaving, spread
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.evaluation.scorer import Request, RequestBatch, Scorer
from lowmem_rmu.model.layers import decoder_layers
from lowmem_rmu.model.loading import load_model


@pytest.mark.parametrize(
    ("first", "last", "most", "found"),
    [
        (3, 7, 8, [3, 4, 5, 6, 7]),
        (7, 31, 8, [7, 10, 13, 17, 20, 24, 27, 31]),
        (5, 5, 3, [5]),
        (0, 9, 2, [0, 9]),
    ],
)
def test_numbers_are_spread_from_the_first_to_the_last(
    first: int, last: int, most: int, found: list[int]
) -> None:
    assert spread(first, last, most) == found


def test_layers_are_seen_in_turn_and_given_back(small_settings: ModelSettings) -> None:
    model, seen = load_model(small_settings, torch.device("cpu")), list[tuple[int, tuple[int, ...]]]()
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with leaving(model, [1, 4], lambda layer, hidden: seen.append((layer, tuple(hidden.shape)))):
        assert model(input_ids=ids).logits.equal(before), "what is only read does not change"
    assert seen == [(1, (1, 3, 64)), (4, (1, 3, 64))]
    with pytest.raises(RuntimeError, match="stop"), leaving(model, [1], stopping):
        model(input_ids=ids)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    assert model(input_ids=ids).logits.equal(before)


def stopping(layer: int, hidden: Tensor) -> None:
    raise RuntimeError("stop")


def test_a_change_reaches_the_cached_prefix_too(
    small_settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, requests = (
        load_model(small_settings, torch.device("cpu")),
        [Request((5, 6, 7, 8, last), ((20, 30, 40, 50),)) for last in (9, 10)],
    )
    scores = {}
    for changed in (False, True):
        with leaving(model, [2], lambda layer, hidden: hidden.flip(-1) if changed else None):  # noqa: B023
            for prefix in (0, 4):
                scores[changed, prefix] = torch.tensor(
                    Scorer(model, tokenizer.pad_token_id).score(requests, RequestBatch(prefix, (0, 1)))
                )
    assert torch.allclose(scores[True, 0], scores[True, 4], atol=1e-4)
    assert (scores[True, 0] - scores[False, 0]).abs().max() > 0.1
