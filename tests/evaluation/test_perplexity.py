"""The loss on held-out text against torch's own, one sequence at a time."""

import math
import random
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.data.tokens import split_text
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.perplexity import divergence, text_loss
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.loading import load_model
from tests.texts import plain

PAD = 2
_made = random.Random(0)
SEQUENCES = [[1, *(_made.randrange(3, 300) for _ in range(length))] for length in (1, 30, 4, 17, 9, 9)]


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    return load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )


def direct(model: PreTrainedModel, sequence: list[int]) -> float:
    """Summed next-token loss of one sequence alone."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(sequence[1:]), reduction="sum").item()


def test_a_loss_that_is_not_finite_is_no_result(
    small_model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError) as caught:
        text_loss(broken, tokenizer, SEQUENCES, 64)
    assert plain(caught.value) == snapshot(
        "The model's loss on held-out text is not finite.\n"
        "Its numbers overflow, or it is damaged. In float16 try model.dtype=bfloat16 or float32; else check "
        "the checkpoint and the adapter."
    )


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_loss_is_that_of_every_sequence_alone_whatever_the_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    result = text_loss(model, tokenizer, SEQUENCES, batch_size)
    tokens = sum(len(sequence) - 1 for sequence in SEQUENCES)
    loss = sum(direct(model, sequence) for sequence in SEQUENCES) / tokens
    assert (result["tokens"], result["sequences"]) == (tokens, len(SEQUENCES))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_token_that_is_also_the_padding_counts_where_it_is_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ending = [[1, 5, 6, PAD], [1, 5, 6, 7, 8, 9, PAD]]
    assert text_loss(model, tokenizer, ending, 64)["loss"] == pytest.approx(
        sum(direct(model, each) for each in ending) / 9, rel=1e-5
    )


def test_stderr_by_hand_on_two_sequences(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    one, other = SEQUENCES[1], SEQUENCES[2]
    sums = (direct(model, one), direct(model, other))
    ratio = sum(sums) / 34
    # Of a ratio of means: the spread of (sum - ratio * count) over n - 1 = 1, times n = 2, over all tokens.
    expected = math.sqrt(2 * ((sums[0] - ratio * 30) ** 2 + (sums[1] - ratio * 4) ** 2)) / 34
    assert expected > 0.01
    assert text_loss(model, tokenizer, [one, other], 64)["stderr"] == pytest.approx(expected, rel=1e-3)


def test_stderr_is_that_of_a_mean_where_lengths_are_equal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    equal = [sequence[:10] for sequence in SEQUENCES if len(sequence) >= 10]
    losses = torch.tensor([direct(model, sequence) / 9 for sequence in equal])
    assert len(losses) == 4
    assert text_loss(model, tokenizer, equal, 64)["stderr"] == pytest.approx(
        (losses.std() / 2).item(), rel=1e-4
    )


def test_one_sequence_has_no_stderr(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_loss(model, tokenizer, SEQUENCES[:1], 64)["stderr"] == 0.0


@pytest.mark.parametrize("max_tokens", [8, 512])
def test_bits_per_byte_count_the_bytes_of_the_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """However it is cut: also where a piece ends inside a character."""
    text = "The quick brown fox \u2013 of course \u2013 \u4e16\u754c \U0001f642 over the dog."
    pieces = split_text(text, tokenizer, max_tokens, True)
    result = text_loss(
        model, tokenizer, [piece.ids for piece in pieces], 64, [piece.written for piece in pieces]
    )
    nats = sum(direct(model, piece.ids) for piece in pieces)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.fixture
def adapted(small_settings: ModelSettings) -> PeftModel:
    model = load_model(small_settings, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(target_modules=["down_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_the_divergence_is_that_of_every_position_by_hand(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
) -> None:
    expected = 0.0
    for sequence in SEQUENCES:
        with torch.no_grad():
            after = adapted(torch.tensor([sequence])).logits[0, :-1].double().log_softmax(-1)
            with base_only(adapted):
                before = adapted(torch.tensor([sequence])).logits[0, :-1].double().log_softmax(-1)
        expected += (before.exp() * (before - after)).sum().item()
    found = divergence(adapted, tokenizer, SEQUENCES, batch_tokens)
    assert found["kl"] == pytest.approx(expected / sum(len(each) - 1 for each in SEQUENCES), rel=1e-4)
    assert found["kl"] > 0.01
    assert found["kl_stderr"] > 0


def test_a_model_does_not_diverge_from_itself(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert divergence(adapted, tokenizer, SEQUENCES, 64)["kl"] == pytest.approx(0, abs=1e-6)
