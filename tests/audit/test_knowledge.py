"""What the audit measures, and what must not be asked because the text to relearn from tells it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.audit.knowledge import Questions, Texts, answers_of, held_out_documents, untold
from lowmem_rmu.config.schema import Corpus, Evaluation, ModelSettings, Task
from lowmem_rmu.data.questions import QuestionSet, load_questions
from lowmem_rmu.evaluation.multiple_choice import ask, evaluate
from lowmem_rmu.evaluation.perplexity import text_loss
from lowmem_rmu.model.loading import load_model

TINY = Path(__file__).parents[2] / "lowmem_rmu/tiny"


@pytest.fixture(scope="module")
def locks() -> QuestionSet:
    return load_questions(
        Evaluation(tasks={"locks": Task(source=str(TINY / "data/questions/locks.jsonl"), role="forgotten")})
    )[0]


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return load_model(ModelSettings(name=str(TINY / "model")), torch.device("cpu"))


def test_questions_are_answered_as_an_evaluation_answers_them(
    locks: QuestionSet, tiny: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    few = QuestionSet(locks.name, locks.about, locks.role, None, locks.questions[:24])
    answers = answers_of(tiny, tokenizer, ask([few]), 4096)
    assert answers == evaluate(tiny, tokenizer, [few], 4096).answers
    knowledge = Questions(ask([few]), tokenizer, 4096)
    assert knowledge.figure(knowledge.of(tiny)) == 1.0


def test_texts_are_told_in_nats_a_token(tiny: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [
        "The lock Tasotch needs ten turns.",
        "The bird Jinidove nests in a reed. All day Jinidove hunts for snails.",
    ]
    knowledge = Texts(tokenizer(texts)["input_ids"], tokenizer, 4096)
    assert knowledge.figure(knowledge.of(tiny)) == pytest.approx(
        text_loss(tiny, tokenizer, knowledge.sequences, 4096)["loss"], rel=1e-5
    )


def test_a_question_about_an_entity_that_the_text_names_is_told(locks: QuestionSet) -> None:
    asked = ask([locks])
    left = untold(asked, ["On the back of Tasotch stands the name of Orlan. The lock needs two turns."])
    named = [each for each in asked if "Tasotch" in each.question.question]
    assert len(named) == 6
    assert [each for each in asked if each not in left] == named


def test_no_text_tells_nothing(locks: QuestionSet) -> None:
    assert untold(ask([locks]), []) == ask([locks])


def test_held_out_documents_are_parted_between_relearning_and_measuring(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(40)), encoding="utf-8"
    )
    relearn, measured = held_out_documents(
        [Corpus(source=str(path), held_out=0.25), Corpus(source=str(path))]
    )
    assert (len(relearn), len(measured), set(relearn) & set(measured)) == (5, 5, set())
