"""Asking otherwise: on a run that forgot, what counts as a way to ask, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks.attack import Pieces, Tried
from lowmem_rmu.audit.attacks.prompting import ATTACK, FREELY, USUAL, about_ways, about_words, row
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.audit.knowledge import Texts
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset
from lowmem_rmu.runs.status import Stopped


@pytest.fixture(scope="module")
def asked_otherwise(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 6, 0)


@pytest.fixture(scope="module")
def pieces_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompting") / "pieces.jsonl"


@pytest.fixture(scope="module")
def tried(asked_otherwise: Audited, pieces_path: Path) -> Tried:
    return ATTACK.run(asked_otherwise, Pieces(pieces_path))


def test_each_condition_tells_of_every_question(asked_otherwise: Audited, tried: Tried) -> None:
    assert {"options reversed", "told to answer", "after 5 examples"} <= tried.conditions.keys()
    for values in tried.conditions.values():
        assert len(values) == len(asked_otherwise.knowledge)
        assert set(values) <= {0.0, 1.0}


def test_the_usual_way_is_what_the_audit_measures(
    asked_otherwise: Audited, tried: Tried, pieces_path: Path
) -> None:
    for side in ("base", "unlearned"):
        with asked_otherwise.side(side) as model:
            assert Pieces(pieces_path).known[f"{USUAL}, {side}"] == asked_otherwise.knowledge.of(model)
    assert USUAL not in tried.conditions


def test_what_base_guesses_is_told_but_does_not_count(tried: Tried) -> None:
    table = {each["way"]: each for each in tried.details["ways"]}
    assert table["options reversed"]["base"] > 0.8, "base knows it whichever letter it stands at"
    assert tried.conditions.keys() == {way for way, each in table.items() if each["counts"] and way != USUAL}
    assert not table["in chat"]["counts"], "the tiny model answers in sentences there"


def test_a_way_counts_above_what_guessing_gives() -> None:
    known = {
        "base": {"a": [1.0] * 30 + [0.0] * 70, "b": [1.0] * 40 + [0.0] * 60},
        "unlearned": {"a": [0.0] * 100, "b": [1.0] * 100},
    }
    assert row("a", known) == {"way": "a", "base": 0.3, "unlearned": 0.0, "counts": False}
    assert row("b", known) == {"way": "b", "base": 0.4, "unlearned": 1.0, "counts": True}


def test_base_answers_freely_and_unlearned_does_not(tried: Tried) -> None:
    [freely] = [each for each in tried.details["ways"] if each["way"] == FREELY]
    assert freely["base"] > 0.8
    assert freely["unlearned"] < 0.5


def test_answers_about_what_was_forgotten_are_no_longer_fluent_and_others_are(tried: Tried) -> None:
    forget, benign = tried.details["words"]["forget"], tried.details["words"]["benign"]
    assert forget["unlearned"]["perplexity"] > 2 * forget["base"]["perplexity"]
    assert benign["unlearned"]["perplexity"] < 2 * benign["base"]["perplexity"]
    assert tried.details["divergence"]["kl"] > 0


def test_an_attack_that_was_stopped_goes_on(
    asked_otherwise: Audited, tried: Tried, pieces_path: Path, tmp_path: Path
) -> None:
    lines = pieces_path.read_text(encoding="utf-8").splitlines(keepends=True)
    half = tmp_path / "half.jsonl"
    half.write_text("".join(lines[:-2]), encoding="utf-8")
    heard = []
    assert ATTACK.run(asked_otherwise, Pieces(half, heard.append)) == tried
    assert len(heard) == 2

    def stop(key: str) -> None:
        raise Stopped(tmp_path)

    assert ATTACK.run(asked_otherwise, Pieces(half, stop)) == tried


def test_without_questions_there_are_answers_alone(asked_otherwise: Audited, tmp_path: Path) -> None:
    texts = Texts(asked_otherwise.forget[:4], asked_otherwise.tokenizer, 4096)
    few = replace(
        asked_otherwise,
        knowledge=texts,
        kept=[],
        forget=asked_otherwise.forget[:6],
        benign=asked_otherwise.benign[:6],
    )
    fewer = replace(few, forget=few.forget[:3], benign=few.benign[:3])
    once_read = ATTACK.cost(fewer).measurements * 2 - ATTACK.cost(few).measurements
    assert once_read == pytest.approx(2), (
        "all else is for the words that are written, twice as many of twice as many prompts"
    )
    tried = ATTACK.run(few, Pieces(tmp_path / "pieces.jsonl"))
    assert tried.conditions == {}
    assert tried.details["ways"] == []
    assert (
        tried.details["words"]["forget"]["unlearned"]["perplexity"]
        > tried.details["words"]["forget"]["base"]["perplexity"]
    )
    assert tried.sentences == list(about_words(tried.details["words"], tried.details["divergence"]))


def test_sentences_name_the_best_way_and_those_that_do_not_count() -> None:
    table = [
        {"way": USUAL, "base": 0.9, "unlearned": 0.25, "counts": True},
        {"way": "in chat", "base": 0.2, "unlearned": 0.9, "counts": False},
        {"way": "as an expert", "base": 0.8, "unlearned": 0.4, "counts": True},
        {"way": "options reversed", "base": 0.9, "unlearned": 0.2, "counts": True},
    ]
    assert list(about_ways(table)) == snapshot(
        [
            (
                "Asked in 2 other ways, unlearned is right in 20% to 40% of the questions (25% as usual), most "
                "often as an expert, where base is right in 80%."
            ),
            "The base model itself guesses, so these ways do not count: in chat.",
        ]
    )


def test_sentences_leave_out_what_was_not_said() -> None:
    said = {"perplexity": 2.0, "repetition": None}
    fluency = {"forget": {"base": said, "unlearned": {"perplexity": 1500.0, "repetition": 0.5}},
               "benign": {"base": said, "unlearned": {"perplexity": None, "repetition": None}}}  # fmt: skip
    assert list(about_words(fluency, None)) == snapshot(
        [
            (
                "Asked about what was forgotten, unlearned answers with a perplexity of 1,500.0 under base (base "
                "itself 2.0) and repeats 50% of its runs of four tokens (base 0%)."
            ),
        ]
    )
