"""The unlearned model in other precisions: which are asked, what they give, and why one is not."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks.attack import Pieces
from lowmem_rmu.audit.attacks.requantization import ATTACK, sentences, ways_of
from lowmem_rmu.audit.context import Audited, Sides, prepare
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset
from tests.texts import plain

OTHERS = ["int8", "bfloat16", "float32"]
MERGED = ["merged, bfloat16", "merged, int8", "merged, NF4"]


@pytest.fixture(scope="module")
def subject(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 20, 0)


def test_every_precision_but_the_runs_own(subject: Audited) -> None:
    assert [way.name for way in ways_of(subject)] == OTHERS + MERGED
    unlearned = subject.sides.base.with_precision(quantisation="none", dtype="bfloat16")
    control = replace(subject, sides=Sides(subject.sides.base, unlearned))
    assert [way.name for way in ways_of(control)] == ["NF4", "int8", "float32"], (
        "a checkpoint has nothing to be merged"
    )
    assert (ATTACK.cost(subject).measurements, ATTACK.cost(control).measurements) == (9, 3)


def test_it_stays_forgotten_where_the_update_is_large(subject: Audited, tmp_path: Path) -> None:
    with subject.side("unlearned") as model:
        unlearned = sum(subject.knowledge.of(model)) / len(subject.knowledge)
    tried = ATTACK.run(subject, Pieces(tmp_path / "requantisation.jsonl"))
    table = tried.details["precisions"]
    assert list(tried.conditions) == list(table) == OTHERS + MERGED
    assert not tried.details["not_asked"]
    assert all(abs(table[name]["unlearned"] - unlearned) < 0.2 for name in table)
    assert all(table[name]["base"] > 0.9 for name in OTHERS), "with the adapter off, it is base again"
    assert all(table[name]["base"] is None for name in MERGED)
    assert subject._loaded is None
    assert [path.name for path in tmp_path.iterdir()] == ["requantisation.jsonl"], "the merged model is gone"
    assert tried.sentences == list(sentences(subject, tried.conditions, {}))


def test_sentences_name_the_precisions_that_give_least_and_most(subject: Audited) -> None:
    conditions = {"NF4": [1.0] * 10 + [0.0] * 10, "int8": [0.0] * 20, "float32": [1.0] * 5 + [0.0] * 15}
    assert list(sentences(subject, conditions, {})) == snapshot(
        ["In 3 other precisions the unlearned model gives between 0.0% right as int8 and 50.0% right as NF4."]
    )


def test_what_does_not_fit_is_told_and_tried_again_later(subject: Audited, tmp_path: Path) -> None:
    evaluation = subject.preset.evaluation.model_copy(update={"batch_tokens": 10**9})
    large = replace(subject, preset=subject.preset.model_copy(update={"evaluation": evaluation}))
    pieces = Pieces(tmp_path / "requantisation.jsonl")
    tried = ATTACK.run(large, pieces)
    assert (tried.conditions, pieces.known) == ({}, {})
    assert list(tried.details["not_asked"]) == OTHERS + MERGED
    reasons = tried.details["not_asked"]
    assert {re.sub(r"[\d.]+ [GM]iB", "<size>", reason) for reason in reasons.values()} == snapshot(
        {"it needs <size>, but <size> are free on cpu"}
    )
    assert plain(tried.sentences[0], reason=reasons["int8"]) == snapshot("Not asked as int8: <reason>.")


def test_what_cannot_be_merged_is_asked_otherwise(subject: Audited, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(subject.sides.unlearned, tmp_path / "alone/adapter"))
    few = replace(
        subject,
        knowledge=replace(subject.knowledge, asked=subject.knowledge.asked[:4]),
        sides=Sides(subject.sides.base, alone),
    )
    tried = ATTACK.run(few, Pieces(tmp_path / "first.jsonl"))
    assert list(tried.conditions) == OTHERS
    assert tried.details["not_asked"] == dict.fromkeys(
        MERGED, snapshot("only a run can be merged, and the adapter lies in none")
    )


def test_a_run_whose_merge_fails_says_why(subject: Audited, forgetful: RunFolder, tmp_path: Path) -> None:
    run = Path(shutil.copytree(forgetful.path, tmp_path / "run"))
    (run / "matrices.json").write_text("{}", encoding="utf-8")
    few = replace(
        subject,
        knowledge=replace(subject.knowledge, asked=subject.knowledge.asked[:4]),
        sides=Sides(subject.sides.base, run / "adapter"),
    )
    reasons = ATTACK.run(few, Pieces(tmp_path / "second.jsonl")).details["not_asked"]
    assert list(reasons) == MERGED
    assert plain(reasons[MERGED[0]], model=subject.sides.base.name, run=run) == snapshot(
        "it cannot be merged: The checkpoint <model> is not the one that <run> was made with: "
        "model.layers.1.mlp.down_proj.weight differs, and 20 more.\n"
        "Put back the files of then, or run again with those of now."
    )
