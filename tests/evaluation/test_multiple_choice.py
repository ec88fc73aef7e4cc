"""A-D questions: the prompt to the byte, the scores against one plain forward pass a question, and the sums over them."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.multiple_choice import evaluate, letter_logprobs, prompt, summarise
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.presets import ModelSettings

WORDS = ["red", "blue", "stone", "river", "the", "a", "of", "seven", "gate"]


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    return load_model(ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu"))


def text(made: random.Random, most: int) -> str:
    return " ".join(made.choices(WORDS, k=made.randint(1, most)))


def question_set(name: str, count: int, group: str | None = None) -> QuestionSet:
    """Questions of many lengths with answers at random."""
    made = random.Random(name)
    questions = [Question(text(made, 25), tuple(text(made, 3) for _ in LETTERS), made.randrange(4)) for _ in range(count)]
    return QuestionSet(name, name.replace("_", " "), "measured", group, tuple(questions))


@pytest.fixture(scope="module")
def sets() -> list[QuestionSet]:
    return [question_set("plain", 9), question_set("all_small", 2, "all"), question_set("all_large", 7, "all")]


def plain_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: str, question: Question) -> list[float]:
    """One forward pass of the context alone, without padding; the sum of probabilities runs over the whole vocabulary."""
    context = tokenizer(prompt(about, question))["input_ids"]
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS]
    assert all(len(ids) == 1 for ids in letters)
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    return [(logits[ids[0]] - logits.exp().sum().log()).item() for ids in letters]


def test_the_prompt_is_the_harness_prompt_to_the_byte() -> None:
    question = Question("  Which gate\nis locked? ", ("North", " South", "East ", "None of them"), 2)
    assert prompt("locks and keys", question) == (
        "The following are multiple choice questions (with answers) about locks and keys.\n\n"
        "Which gate\nis locked?\nA. North\nB.  South\nC. East \nD. None of them\nAnswer:"
    )


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_equal_those_of_one_question_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet], batch_tokens: int
) -> None:
    """So neither batches nor left padding matter, and answers come in the order of the questions."""
    answers = evaluate(model, tokenizer, sets, batch_tokens).answers
    asked = [(each, number, question) for each in sets for number, question in enumerate(each.questions)]
    assert [(answer["task"], answer["index"]) for answer in answers] == [(each.name, number) for each, number, _ in asked]
    for answer, (each, _, question) in zip(answers, asked, strict=True):
        expected = plain_logprobs(model, tokenizer, each.about, question)
        assert answer["logprobs"] == pytest.approx(expected, abs=1e-5)
        assert answer["answer"] == expected.index(max(expected))
        assert answer["gold"] == question.gold
        assert answer["correct"] is (answer["answer"] == question.gold)
    assert 0 < sum(answer["correct"] for answer in answers) < len(answers)


def test_probabilities_are_shares_of_the_whole_vocabulary(model: PreTrainedModel) -> None:
    context, size = [1, 5, 9, 30], model.config.vocab_size
    everything = letter_logprobs(model, [context], list(range(size)), pad_id=2)
    assert everything.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert everything.dtype == torch.float32
    four = letter_logprobs(model, [context], [7, 3, 11, 8], pad_id=2)
    assert torch.equal(four, everything[:, [7, 3, 11, 8]])


def test_no_batch_has_more_tokens_than_asked_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]) -> None:
    shapes: list[tuple[int, int]] = []

    def note(_: Any, __: Any, options: dict[str, Tensor]) -> None:
        rows, columns = options["input_ids"].shape
        shapes.append((rows, columns))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    evaluate(model, tokenizer, sets, batch_tokens=300)
    hook.remove()
    assert sum(rows for rows, _ in shapes) == 18
    assert all(rows * columns <= 300 for rows, columns in shapes)
    assert max(rows for rows, _ in shapes) > 1
    assert [columns for _, columns in shapes] == sorted((columns for _, columns in shapes), reverse=True)  # the largest first: it fits or fails


def test_a_question_longer_than_a_batch_is_asked_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert evaluate(model, tokenizer, [question_set("plain", 3)], batch_tokens=1).scores["tasks"]["plain"]["questions"] == 3


@pytest.mark.parametrize(
    ("correct", "total", "accuracy", "stderr"), [(3, 4, 0.75, 0.25), (1, 5, 0.2, math.sqrt(0.04)), (0, 3, 0.0, 0.0), (1, 1, 1.0, 0.0)]
)
def test_stderr_is_in_the_n_minus_1_form(correct: int, total: int, accuracy: float, stderr: float) -> None:
    summary = summarise([{"correct": number < correct} for number in range(total)])
    assert summary == {"accuracy": pytest.approx(accuracy), "stderr": pytest.approx(stderr), "questions": total, "correct": correct}


def test_a_group_is_weighed_by_its_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]) -> None:
    evaluated = evaluate(model, tokenizer, sets, 1000)
    tasks, group = evaluated.scores["tasks"], evaluated.scores["groups"]["all"]
    assert list(tasks) == ["plain", "all_small", "all_large"]
    assert list(evaluated.scores["groups"]) == ["all"]
    assert (group["questions"], group["correct"]) == (9, tasks["all_small"]["correct"] + tasks["all_large"]["correct"])
    assert group["accuracy"] == pytest.approx(group["correct"] / 9)
    assert tasks["plain"] == summarise(evaluated.answers[:9])
    assert evaluated.scores["questions_per_second"] == pytest.approx(18 / evaluated.scores["seconds"])


def test_the_model_is_asked_as_it_stands(small_settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [question_set("plain", 3)]
    adapted = get_peft_model(load_model(small_settings, torch.device("cpu")), LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    base = load_model(small_settings, torch.device("cpu"))
    expected = [answer["logprobs"] for answer in evaluate(base, tokenizer, questions, 1000).answers]
    on = [answer["logprobs"] for answer in evaluate(adapted, tokenizer, questions, 1000).answers]
    with base_only(adapted):
        off = [answer["logprobs"] for answer in evaluate(adapted, tokenizer, questions, 1000).answers]
    assert off == expected
    assert on != expected


def test_progress_reaches_the_total(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]) -> None:
    heard: list[tuple[int, float]] = []
    evaluated = evaluate(model, tokenizer, sets, 300, lambda done, accuracy: heard.append((done, accuracy)))
    assert len(heard) > 1
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (18, pytest.approx(sum(answer["correct"] for answer in evaluated.answers) / 18))


def test_a_question_longer_than_the_model_reads_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    long = Question("stone " * 300, ("a", "b", "c", "d"), 0)
    tokens = len(tokenizer(prompt("gates", long))["input_ids"])
    with pytest.raises(UserError) as raised:
        evaluate(model, tokenizer, [QuestionSet("gates", "gates", "kept", None, (long,))], 1000)
    assert str(raised.value) == f"The longest question takes {tokens} tokens, but the model reads 256 at most.\nShorten or leave out that question."


def test_a_tokenizer_that_splits_the_letters_is_refused(model: PreTrainedModel) -> None:
    characters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    with pytest.raises(UserError, match='This tokenizer splits " A" into several tokens'):
        evaluate(model, PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="?"), [question_set("plain", 1)], 1000)
