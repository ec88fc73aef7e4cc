"""What else went: on a run that forgot, and its figures against ones worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks.attack import Pieces, Tried
from lowmem_rmu.audit.attacks.collateral import (
    ATTACK,
    about_texts,
    by_nearness,
    calibration,
    mean_activations,
    nearness,
    tasks,
)
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.audit.knowledge import Texts, evenly
from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.multiple_choice import ask
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset
from lowmem_rmu.runs.records import Answer
from tests.records import answer_row


@pytest.fixture(scope="module")
def around(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    audited = prepare(
        "forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 10, 0
    )
    return replace(audited, benign=evenly(audited.benign, 40))


@pytest.fixture(scope="module")
def tried(around: Audited, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return ATTACK.run(around, Pieces(tmp_path_factory.mktemp("collateral") / "pieces.jsonl"))


def test_other_tasks_are_asked_on_both_sides(tried: Tried) -> None:
    rows = {each["task"]: each for each in tried.details["tasks"]}
    assert rows.keys() == {"subjects", "subjects, adjacent", "held_out", "crystals"}
    assert {rows[name]["role"] for name in ("subjects, adjacent", "crystals")} == {"adjacent", "measured"}
    for each in rows.values():
        assert each["base"] > 0.8
        assert each["low"] <= each["change"] <= each["high"]
        assert each["change"] == pytest.approx(each["unlearned"] - each["base"])
    assert tried.conditions == {}


def test_unlearned_is_off_where_it_forgot_and_not_elsewhere(tried: Tried) -> None:
    found = tried.details["calibration"]
    assert found["forgotten"]["unlearned"]["error"] > found["forgotten"]["base"]["error"] + 0.1
    assert found["other"]["unlearned"]["error"] < 0.2


def test_texts_are_told_in_quarters_from_the_nearest_on(tried: Tried) -> None:
    quarters = tried.details["texts"]
    assert [each["texts"] for each in quarters] == [10, 10, 10, 10]
    assert sorted((each["nearness"] for each in quarters), reverse=True) == [
        each["nearness"] for each in quarters
    ]
    for each in quarters:
        assert each["change"] == pytest.approx(each["unlearned"] - each["base"])


def test_text_about_the_topic_is_nearer_to_it_than_any_other(around: Audited) -> None:
    near = nearness(around, [*around.forget[:5], *around.benign[:20]])
    assert min(near[:5]) > max(near[5:])


def test_activations_are_those_of_each_text_alone(around: Audited) -> None:
    layer = around.preset.rmu.target_layer
    texts = sorted(around.benign[:4], key=len)
    with around.side("base") as model, torch.no_grad():
        found = mean_activations(around, model, texts)
        for ids, mean in zip(texts, found, strict=True):
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            assert torch.allclose(mean, states[1:].float().mean(0), rtol=0.02, atol=0.02)


def rows_of(*logprobs: list[float]) -> list[Answer]:
    return [answer_row(logprobs=each, answer=max(range(4), key=each.__getitem__)) for each in logprobs]


def test_calibration_is_the_distance_between_how_sure_and_how_often_right() -> None:
    asked = ask([QuestionSet("a", "a", "kept", None, (Question("What?", ("a", "b", "c", "d"), 0),) * 4)])
    sure = torch.tensor([0.85, 0.05, 0.05, 0.05]).log()
    even = [-3.0] * 4
    found = calibration(asked, rows_of(sure.tolist(), sure.tolist(), sure.flip(0).tolist(), even))
    assert found is not None
    assert found["confidence"] == pytest.approx((3 * 0.85 + 0.25) / 4)
    assert found["error"] == pytest.approx((3 * abs(0.85 - 2 / 3) + abs(0.25 - 1)) / 4)


def test_calibration_is_told_of_letters_alone() -> None:
    asked = ask(
        [QuestionSet("a", "a", "kept", None, (Question("What?", ("a", "b", "c", "d"), 0),), scoring="cloze")]
    )
    assert calibration(asked, rows_of([-1.0, -2.0, -3.0, -4.0])) is None


def test_quarters_begin_with_what_is_nearest() -> None:
    texts, near = [[1, 2, 3]] * 8, [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6]
    table = by_nearness(
        texts, near, {"base": [2.0] * 8, "unlearned": [2.0, 6.0, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0]}
    )
    assert [each["nearness"] for each in table] == pytest.approx([0.85, 0.65, 0.35, 0.15])
    assert [each["change"] for each in table] == pytest.approx([1.5, 0, 0, 0]), (
        "nats a predicted token, of which each text has two"
    )
    assert table[0]["change_stderr"] == pytest.approx(0.5)
    assert list(about_texts(table)) == snapshot(
        ["Text nearest to the topic lost 1.50 nats/token (standard error 0.50), the farthest 0.00 (0.00)."]
    )


def test_large_tasks_are_sampled_evenly(around: Audited) -> None:
    questions = tuple(Question(f"What is {number}?", ("a", "b", "c", "d"), 0) for number in range(150))
    sets = [QuestionSet(f"big_{name}", name, "kept", "big", questions) for name in ("one", "two")]
    found = tasks(replace(around, kept=sets, measured=[]))
    assert list(found) == ["big"]
    assert [sum(each.asked.name == member.name for each in found["big"]) for member in sets] == [50, 50]


def test_without_questions_there_is_text(around: Audited, tmp_path: Path) -> None:
    texts = Texts(around.forget[:4], around.tokenizer, 4096)
    found = ATTACK.run(
        replace(around, knowledge=texts, kept=[], measured=[]), Pieces(tmp_path / "pieces.jsonl")
    )
    assert found.details["tasks"] == []
    assert found.details["calibration"] == {
        kind: {"base": None, "unlearned": None} for kind in ("other", "forgotten")
    }
    assert len(found.details["texts"]) == 4


def test_with_neither_tasks_nor_text_there_is_nothing_to_look_at(around: Audited) -> None:
    assert ATTACK.lacks(around) is None
    assert ATTACK.lacks(replace(around, kept=[], measured=[], benign=[])) == snapshot(
        "it needs tasks that were not to be forgotten, or text to retain"
    )
