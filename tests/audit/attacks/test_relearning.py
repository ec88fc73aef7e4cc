"""Relearning: what was only hidden comes back by a few steps on other text about the topic, and the twin shows what training itself does."""

from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks import relearning
from lowmem_rmu.audit.attacks.attack import Pieces
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.runs.folder import RunFolder

NOTHING_HELD_OUT = ["topics.compounds.corpus.held_out=0", "topics.locks.corpus.held_out=0"]


@pytest.fixture(scope="module")
def audited(forgetful: RunFolder) -> Audited:
    return prepare(
        "forgetful",
        load_preset("tiny"),
        forgetful.adapter,
        torch.device("cpu"),
        ["compounds", "locks"],
        20,
        0,
    )


def test_a_few_steps_bring_back_what_was_hidden(audited: Audited) -> None:
    name, sequences = next(iter(relearning.texts_of(audited).items()))
    assert name == snapshot("unseen text about the topic")
    plain = {side: audited.measure(side) for side in ("base", "unlearned")}
    points = relearning.curve(audited, "unlearned", sequences, (5, 25))
    assert audited.knowledge.figure(points["25"]) > audited.knowledge.figure(plain["unlearned"]) + 0.3
    assert relearning.steps_to_half(audited, plain, points) == 25
    assert audited.measure("unlearned") == plain["unlearned"]  # and nothing of it stays


def test_the_same_seed_learns_the_same(audited: Audited) -> None:
    sequences = audited.benign[:20]
    assert relearning.curve(audited, "unlearned", sequences, (3,)) == relearning.curve(
        audited, "unlearned", sequences, (3,)
    )


def test_the_whole_attack_tells_curves_of_both_sides_and_keeps_its_pieces(
    audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relearning, "MEASURED_AFTER", {"unlearned": (1, 2), "base": (2,)})
    monkeypatch.setattr(relearning, "BENIGN", (10,))
    pieces = Pieces(tmp_path / "pieces.jsonl")
    tried = relearning.relearn(audited, pieces)
    texts = list(tried.details["curves"])
    assert texts == snapshot(["unseen text about the topic", "10 unrelated samples"])
    assert list(tried.conditions) == [f"{text}, {steps} steps" for text in texts for steps in (1, 2)]
    assert {
        text: {side: list(points) for side, points in curves.items()}
        for text, curves in tried.details["curves"].items()
    } == {text: {"unlearned": ["1", "2"], "base": ["2"]} for text in texts}
    heard = list[str]()
    assert relearning.relearn(audited, Pieces(tmp_path / "pieces.jsonl", heard.append)) == tried
    assert heard == []


def test_without_unseen_text_only_unrelated_text_is_learned_and_that_is_said(forgetful: RunFolder) -> None:
    audited = prepare(
        "forgetful",
        load_preset("tiny", NOTHING_HELD_OUT),
        forgetful.adapter,
        torch.device("cpu"),
        ["compounds", "locks"],
        20,
        0,
    )
    texts = list(relearning.texts_of(audited))
    assert texts == snapshot(["10 unrelated samples", "100 unrelated samples", "500 unrelated samples"])
    assert relearning.lacks(audited) is None
    assert list(relearning.sentences(audited, {texts[0]: None})) == snapshot(
        [
            "100 steps on 10 unrelated samples recovered less than half.",
            (
                "No text about the topic was held out: set topics.NAME.corpus.held_out in a new run to relearn "
                "from it."
            ),
        ]
    )


def test_without_any_text_it_cannot_be_tried(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "relearning", [])
    monkeypatch.setattr(audited, "benign", [])
    assert relearning.lacks(audited) == snapshot(
        "it needs text to learn from, and there are fewer than 8 samples held out and 10 to retain"
    )
