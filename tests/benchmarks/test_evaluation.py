"""The benchmark runs on the shipped model, and what it says of both sides is right."""

import re
import sys
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from benchmarks.evaluation import Found, Harness, Ours, answers, choose_subjects, largest_difference, main
from lowmem_rmu.errors import UserError
from tests.texts import plain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
ROOT = Path(__file__).parents[2]
MMLU = ROOT / "tests/data/mmlu"


def test_it_prints_both_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        model=str(ROOT / "lowmem_rmu/tiny/model"),
        data=MMLU,
        num_fewshot=5,
        subjects=None,
        limit=4,
        rounds=1,
        device="cpu",
        dtype="float32",
        harness_batch=4,
    )
    said = capsys.readouterr().out
    title = next(line.strip() for line in said.splitlines() if "5-shot" in line)
    assert plain(title, model=ROOT / "lowmem_rmu/tiny/model") == snapshot(
        "<model>, float32 on cpu: 8 questions of 2 subjects, 5-shot"
    )
    assert re.search(rf"{Harness.name} +│ +4 questions │ +[\d.]+ │ +[\d.]+ │ +1.0x │", said)
    assert re.search(rf"{Ours.name} +│ +\d+ tokens │ +[\d.]+ │ +[\d.]+ │ +[\d.]+x │", said)
    assert re.search(
        r"mmlu_astronomy +│ +4 │ +(0\.\d{4}) │ +(0\.\d{4}) │ +\1 │ +\2 │ +4 │ +4 │ +[\d.]+e-0[4-9] │", said
    )
    assert re.search(r"mmlu_social_sciences +│ +│ +(0\.\d{4}) │ +(0\.\d{4}) │ +\1 │ +\2 │", said)
    assert re.search(r"together +│ +8 │ +│ +│ +│ +│ +8 │ +8 │", said)


def test_a_folder_without_the_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose_subjects(tmp_path, None)
    assert plain(caught.value, folder=tmp_path, data=MMLU) == snapshot(
        "<folder> holds no test/<subject>_test.csv.\nGive the folder that holds MMLU's test and dev."
    )
    with pytest.raises(UserError) as caught:
        choose_subjects(MMLU, "high_school_geography,astronimy")
    assert plain(caught.value, folder=tmp_path, data=MMLU) == snapshot(
        '<data> holds no subject "astronimy". Did you mean "astronomy"?'
    )
    assert choose_subjects(MMLU, None) == ("astronomy", "high_school_geography")


def test_answers_and_differences_are_those_of_the_same_questions() -> None:
    ours, harness = (
        Found({}, {"task": rows}, {})
        for rows in ([[-1.0, -2.0], [-3.0, -1.5]], [[-1.0, -2.25], [-1.5, -1.5]])
    )
    assert (answers(ours, "task"), answers(harness, "task")) == ([0, 1], [0, 0])
    assert largest_difference(ours, harness, "task") == 1.5
