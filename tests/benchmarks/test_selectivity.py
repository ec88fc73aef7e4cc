"""The benchmark of selectivity: what it makes of a run's answers, and which settings it runs."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.selectivity import TOPICS, group_result, preset_of, run_name
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.runs.records import Answer
from tests.records import answer_row


def rows(golds: list[int], answers: list[int]) -> list[Answer]:
    return [
        answer_row(gold=gold, answer=answer, correct=gold == answer)
        for gold, answer in zip(golds, answers, strict=True)
    ]


def test_a_group_s_change_is_paired_by_question() -> None:
    golds = [0, 1, 2, 3] * 5
    before = rows(golds, golds)
    # The last five answers are wrong now.
    after = rows(golds, golds[:15] + [(gold + 1) % 4 for gold in golds[15:]])
    found = group_result(before, after)
    assert (found.base, found.unlearned, found.change) == (100, 75, -25)
    low, high = found.bounds
    assert low < -25 < high < 0


def test_one_letter_for_everything_is_guessing_whatever_its_share() -> None:
    golds = [3] * 12 + [0, 1, 2] * 3
    found = group_result(rows(golds, golds), rows(golds, [3] * len(golds)))
    assert found.unlearned == pytest.approx(100 * 12 / 21)
    assert found.balanced == pytest.approx(25)
    assert found.letters == "D21"


def test_both_topics_have_the_same_settings_and_share_no_subject(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 28}))
    data = Path(__file__).parent.parent / "data"
    presets = {}
    for topic in TOPICS:
        file = tmp_path / f"{topic}.yaml"
        file.write_text(yaml.safe_dump(preset_of(topic, tmp_path, data, 20, tmp_path / "neighbors.jsonl")))
        presets[topic] = load_preset(str(file))
    economics, psychology = presets["economics"], presets["psychology"]
    assert economics.rmu == psychology.rmu
    assert (
        [corpus.share for corpus in economics.retain.corpora]
        == [corpus.share for corpus in psychology.retain.corpora]
        == [0.4, None, None]
    )
    without_text = {"corpus"}
    assert economics.topics["economics"].model_dump(exclude=without_text) == psychology.topics[
        "psychology"
    ].model_dump(exclude=without_text)
    for subjects in TOPICS.values():
        groups = [subjects.forgotten, subjects.adjacent, subjects.kept]
        assert sum(map(len, groups)) == len(set(sum(groups, [])))


def test_a_variant_s_run_has_a_name_that_a_folder_may_have() -> None:
    assert run_name("economics", "topics.TOPIC.alpha=400 rmu.adapter_layers=[5,6]", "0", 80) == (
        "economics-80-topics.TOPIC.alpha-400_rmu.adapter_layers-_5_6_-0"
    )
