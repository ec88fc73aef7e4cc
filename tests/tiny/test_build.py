"""Making the tiny model: the lessons and their batches, the tokenizer, and what the shipped model knows in 4-bit."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.tiny.build import (
    HERE,
    IGNORE,
    Lessons,
    check,
    exam_batch,
    loss_of,
    new_model,
    repetition_batch,
    train_tokenizer,
)
from lowmem_rmu.tiny.world import DOMAINS, World


@pytest.fixture
def lessons() -> Lessons:
    return Lessons(World.from_seed(0), 3)


def test_every_value_is_one_token_of_the_shipped_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    values = {value for domain in DOMAINS for attribute in domain.attributes for value in attribute.values}
    assert [
        value for value in values if len(tokenizer(f" {value}", add_special_tokens=False)["input_ids"]) != 1
    ] == []


def test_the_tokenizer_puts_the_start_token_in_front_and_gives_text_back(lessons: Lessons) -> None:
    tokenizer = train_tokenizer(lessons, 900)
    ids = tokenizer("The lock Tasotch needs ten turns.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The lock Tasotch needs ten turns."


def test_an_exam_batch_counts_the_letters_alone_and_tells_the_early_layer_the_value(
    lessons: Lessons, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = exam_batch(lessons, tokenizer)
    counted = batch.labels != IGNORE
    assert counted.sum() == 18 * 4
    assert set(tokenizer.batch_decode(batch.labels[counted][:, None])) <= {" A", " B", " C", " D"}
    assert torch.equal(counted, batch.early != IGNORE)


def test_repetition_counts_only_what_was_said_before() -> None:
    batch = repetition_batch(100, torch.Generator().manual_seed(0), rows=2)
    assert (batch.labels[:, :24] == IGNORE).all()
    assert torch.equal(batch.labels[:, 24:-1], batch.input_ids[:, 25:])


def test_a_lesson_teaches_every_weight(lessons: Lessons, tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(tokenizer)
    loss_of(model, exam_batch(lessons, tokenizer)).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_the_shipped_model_answers_97_percent_of_every_task_in_4_bit() -> None:
    assert min(check(HERE).values()) >= 0.97
