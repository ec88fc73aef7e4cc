"""The loss on held-out text against torch's own, one sequence at a time."""

import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lowmem_rmu.evaluation.perplexity import text_loss
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.presets import ModelSettings

PAD = 2
_made = random.Random(0)
SEQUENCES = [[1, *(_made.randrange(3, 300) for _ in range(length))] for length in (1, 30, 4, 17, 9, 9)]


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    return load_model(ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu"))


def direct(model: PreTrainedModel, sequence: list[int]) -> float:
    """Summed next-token loss of one sequence alone."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(sequence[1:]), reduction="sum").item()


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_loss_is_that_of_every_sequence_alone_whatever_the_padding(model: PreTrainedModel, batch_size: int) -> None:
    result = text_loss(model, SEQUENCES, PAD, batch_size)
    tokens = sum(len(sequence) - 1 for sequence in SEQUENCES)
    loss = sum(direct(model, sequence) for sequence in SEQUENCES) / tokens
    assert (result["tokens"], result["sequences"]) == (tokens, len(SEQUENCES))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_token_that_is_also_the_padding_counts_where_it_is_text(model: PreTrainedModel) -> None:
    ending = [[1, 5, 6, PAD], [1, 5, 6, 7, 8, 9, PAD]]
    assert text_loss(model, ending, PAD, 64)["loss"] == pytest.approx(sum(direct(model, each) for each in ending) / 9, rel=1e-5)


def test_stderr_by_hand_on_two_sequences(model: PreTrainedModel) -> None:
    one, other = SEQUENCES[1], SEQUENCES[2]
    sums = (direct(model, one), direct(model, other))
    ratio = sum(sums) / 34
    # Of a ratio of means: the spread of (sum - ratio * count) over n - 1 = 1, times n = 2, over all tokens.
    expected = math.sqrt(2 * ((sums[0] - ratio * 30) ** 2 + (sums[1] - ratio * 4) ** 2)) / 34
    assert expected > 0.01
    assert text_loss(model, [one, other], PAD, 64)["stderr"] == pytest.approx(expected, rel=1e-3)


def test_stderr_is_that_of_a_mean_where_lengths_are_equal(model: PreTrainedModel) -> None:
    equal = [sequence[:10] for sequence in SEQUENCES if len(sequence) >= 10]
    losses = torch.tensor([direct(model, sequence) / 9 for sequence in equal])
    assert len(losses) == 4
    assert text_loss(model, equal, PAD, 64)["stderr"] == pytest.approx((losses.std() / 2).item(), rel=1e-4)


def test_one_sequence_has_no_stderr(model: PreTrainedModel) -> None:
    assert text_loss(model, SEQUENCES[:1], PAD, 64)["stderr"] == 0.0
