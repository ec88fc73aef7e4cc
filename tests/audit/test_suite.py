"""An audit as a whole: costs told, time and memory kept to, stopped and gone on with, and what it says where it cannot work."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit import suite
from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried
from lowmem_rmu.audit.context import Audited
from lowmem_rmu.audit.suite import (
    ATTACKS,
    FAMILY,
    MOST_QUESTIONS,
    Audit,
    Forgotten,
    Settings,
    bytes_needed,
    claim,
    open_audit,
    planned,
    read_forgotten,
)
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import read_lines, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.status import Stopped
from tests.texts import plain

CPU = torch.device("cpu")
FEW = Settings(limit=20)


class Patient:
    """Follows an audit, and asks to stop before a piece."""

    def __init__(self, stop_before: str | None = None) -> None:
        self.stop_before, self.pieces, self.stages = stop_before, list[str](), list[str]()
        self.next = ""

    def started(self, stage: str, total: int) -> None:
        self.stages.append(stage)

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        self.pieces.append(str(figures[""]))

    def noted(self, sentence: str) -> None:
        pass

    def asks_to_stop(self) -> bool:
        return len(self.pieces) == (int(self.stop_before) if self.stop_before else -1)


def half_back(audited: Audited, pieces: Pieces) -> Tried:
    """Knows every second question again."""
    first = pieces.get("first", lambda: [1.0] * len(audited.knowledge))
    second = pieces.get("second", lambda: [0.0] * len(audited.knowledge))
    return Tried(
        {"odd": [(first if index % 4 < 2 else second)[index] for index in range(len(audited.knowledge))]},
        {"seen": 2},
        ["So it is."],
    )


def knows_nothing(audited: Audited, pieces: Pieces) -> Tried:
    return Tried({"nothing": [0.0] * len(audited.knowledge)})


def runs_out(audited: Audited, pieces: Pieces) -> Tried:
    raise torch.OutOfMemoryError("out of memory")


HALF = Attack("half", "does half come back?", lambda audited: Cost(2), half_back)
NOTHING = Attack("nothing", "does nothing come back?", lambda audited: Cost(1), knows_nothing)
LONG = Attack("long", "does it take a year?", lambda audited: Cost(1e9), half_back)
LARGE = Attack("large", "is it too large?", lambda audited: Cost(1, extra_bytes=2**50), half_back)
GREEDY = Attack("greedy", "does memory run out?", lambda audited: Cost(1), runs_out)
LACKING = Attack(
    "lacking",
    "is the text there?",
    lambda audited: Cost(1),
    half_back,
    lambda audited: "it needs text that is not there",
)


@pytest.fixture
def run(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "forgetful")))


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suite, "ATTACKS", {each.name: each for each in (HALF, NOTHING, LONG, LARGE, GREEDY, LACKING)}
    )


def opened(
    run: RunFolder, watcher: Patient | None = None, settings: Settings = FEW, again: bool = False
) -> Audit:
    return open_audit(run, CPU, settings, watcher or Patient(), again)


def attack(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in content["attacks"] if each["attack"] == name)


@pytest.mark.usefixtures("attacks")
def test_base_unlearned_and_attacked_side_by_side(run: RunFolder) -> None:
    audit = opened(run)
    content = asdict(audit.run([HALF, NOTHING]))
    assert json.loads(json.dumps(content)) == json.loads(run.audit_result.read_text(encoding="utf-8"))
    assert (content["items"], content["measured_in"], content["base"]) == (40, "accuracy", 1.0)
    best = attack(content, "half")["best"]
    assert best["attacked"] == 0.5
    floor = max(content["unlearned"], 0.25)
    assert content["floor"] == floor
    assert best["recovered"] == pytest.approx((0.5 - floor) / (1 - floor))
    assert attack(content, "half")["details"] == {"seen": 2}
    assert content["verdict"]["mark"] == ("hidden" if best["low"] > 0.25 else "inconclusive")
    assert attack(content, "long")["reason"] == snapshot("not asked for")


@pytest.mark.usefixtures("attacks")
def test_what_does_not_fit_is_named_and_the_rest_is_run(run: RunFolder) -> None:
    content = asdict(opened(run).run([LONG, LARGE, GREEDY, LACKING, NOTHING], budget=60.0))
    reasons = {each["attack"]: each["reason"] for each in content["attacks"]}
    assert " 1.0 min " in reasons["long"] or " 60 s " in reasons["long"]
    assert " 1048576" in reasons["large"].replace(",", "")
    told = [reasons[name] for name in ("long", "large", "greedy")]
    told = [re.sub(r"[\d.]+ (GiB|MiB|min|s)\b", "<number>", reason) for reason in told]
    assert told == snapshot(
        [
            "it would take about <number>, and <number> of the budget are left",
            "it needs <number>, but <number> are free on cpu",
            "out of memory on cpu; the estimate was <number>",
        ]
    )
    assert reasons["lacking"] == "it needs text that is not there"
    assert attack(content, "nothing")["finding"] == "found nothing"
    assert content["verdict"]["mark"] == "inconclusive"


@pytest.mark.usefixtures("attacks")
def test_a_budget_of_nothing_runs_nothing_and_says_so(run: RunFolder) -> None:
    content = asdict(opened(run).run([HALF, NOTHING], budget=0.0))
    assert {each["state"] for each in content["attacks"]} == {"not run"}
    assert next(sentence for sentence in content["verdict"]["sentences"] if "half" in sentence) == snapshot(
        "Not run: half, nothing, long, large, greedy, lacking."
    )


@pytest.mark.usefixtures("attacks")
def test_a_stopped_audit_goes_on_where_it_was(run: RunFolder) -> None:
    stopping = Patient(stop_before="4")  # base, unlearned, seconds, first
    with pytest.raises(Stopped):
        opened(run, stopping).run([HALF])
    assert [row["key"] for row in read_lines(run.audit / "half.jsonl")] == ["first", "seconds so far"]
    again = Patient()
    content = asdict(opened(run, again).run([HALF]))
    assert again.pieces == ["second"]
    assert attack(content, "half")["best"]["attacked"] == 0.5


@pytest.mark.usefixtures("attacks")
def test_what_is_still_to_come_is_not_run_yet(run: RunFolder) -> None:
    opened(run).run([LACKING])
    with pytest.raises(Stopped):
        # What was measured is there: before HALF's second piece.
        opened(run, Patient(stop_before="1")).run([NOTHING, HALF, LACKING])
    reasons = {
        row["attack"]: row["reason"]
        for row in json.loads(run.audit_result.read_text(encoding="utf-8"))["attacks"]
    }
    assert reasons == snapshot(
        {
            "half": "not yet",
            "nothing": None,
            "long": "not asked for",
            "large": "not asked for",
            "greedy": "not asked for",
            "lacking": "not yet",
        }
    )


@pytest.mark.usefixtures("attacks")
def test_what_an_earlier_audit_found_stays(run: RunFolder) -> None:
    opened(run).run([HALF])
    content = asdict(opened(run).run([NOTHING]))
    assert [each["attack"] for each in content["attacks"] if each["state"] == "done"] == ["half", "nothing"]


def test_settings_without_a_result_bind_nothing(tmp_path: Path) -> None:
    """As a killed audit leaves them."""
    place, result = tmp_path / "audit", tmp_path / "audit.json"
    claim(place, result, Settings(10), again=False)
    (place / "measured.jsonl").write_text('{"key": "base", "value": 1}\n')
    claim(place, result, Settings(20), again=False)
    assert [path.name for path in place.iterdir()] == ["settings.json"], (
        "what was measured with other questions goes"
    )
    (place / "suffix.jsonl").write_text('{"key": "first", "value": 1}\n')
    with pytest.raises(UserError) as caught:
        claim(place, result, Settings(10), again=False)
    assert plain(caught.value, folder=tmp_path) == snapshot(
        "<folder> was audited with another limit.\nGive the same; or, to discard those results: --again"
    )
    claim(place, result, Settings(20), again=False)
    assert (place / "suffix.jsonl").exists()


@pytest.mark.usefixtures("attacks")
def test_other_settings_are_refused_until_the_old_results_are_discarded(run: RunFolder) -> None:
    opened(run).run([NOTHING])
    with pytest.raises(UserError) as caught:
        opened(run, settings=Settings(10))
    assert plain(caught.value, run=run.path) == snapshot(
        "<run> was audited with another limit.\nGive the same; or, to discard those results: --again"
    )
    content = asdict(opened(run, settings=Settings(10), again=True).run([]))
    assert (content["items"], attack(content, "nothing")["state"]) == (20, "not run")


@pytest.mark.parametrize(
    ("base", "unlearned", "power", "limit"),
    [
        (1.0, 0.25, None, 100),
        (0.65, 0.10, None, 240),
        (0.45, 0.25, None, MOST_QUESTIONS),
        (0.65, 0.10, 0.8, 240),
        (0.45, 0.25, 0.8, 950),
    ],
)
def test_questions_are_planned_by_power(
    tmp_path: Path, base: float, unlearned: float, power: float | None, limit: int
) -> None:
    """Of each of two tasks; without a wish there are 100 to 300."""
    forgotten = Forgotten(load_preset("tiny"), ["a", "b"], base, unlearned)
    assert planned(Settings(seed=3), forgotten, tmp_path / "settings.json", False, power) == Settings(
        limit, 3
    )
    assert planned(Settings(7), forgotten, tmp_path / "settings.json", False, power) == Settings(7)


def test_an_audit_continues_with_its_own_number_of_questions(tmp_path: Path) -> None:
    forgotten, earlier = Forgotten(load_preset("tiny"), ["a"], 1.0, 0.25), tmp_path / "settings.json"
    for limit in (42, None):
        write_json(earlier, {"limit": limit, "seed": 0})
        assert planned(Settings(), forgotten, earlier, False, None) == Settings(limit)
        assert planned(Settings(), forgotten, earlier, True, None) == Settings(140), "it starts over"


def test_every_attack_that_recovers_is_one_of_the_family() -> None:
    assert len(ATTACKS) - 1 == FAMILY
    assert [name for name, each in ATTACKS.items() if not each.recovers] == ["collateral"]


def test_what_was_forgotten_is_known_before_anything_is_loaded(run: RunFolder) -> None:
    forgotten = read_forgotten(run)
    assert forgotten.tasks == ["compounds", "locks"]
    assert forgotten.base > 0.9 > 0.6 > forgotten.unlearned


def test_too_few_questions_are_told_by_a_wide_interval(run: RunFolder) -> None:
    audit = opened(run, settings=Settings(2))
    assert len(audit.audited.knowledge) == 4
    found = audit._condition("half", [1.0, 0.0, 1.0, 0.0])
    assert found.low is None or found.high is None or found.high - found.low > 0.5


def test_a_run_that_has_not_unlearned_is_refused(run: RunFolder) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(UserError) as caught:
        opened(run)
    assert plain(caught.value, run=run.path) == snapshot(
        "Run <run> has unlearned nothing, so there is nothing to audit.\n"
        "Go on with it: --resume --name forgetful"
    )


def test_a_run_that_forgot_nothing_is_refused(run: RunFolder) -> None:
    for file in (run.answers, run.evaluation):
        shutil.copy(file("base"), file("unlearned"))
    with pytest.raises(UserError) as caught:
        opened(run)
    assert plain(caught.value, run=run.path) == snapshot(
        "Run <run> forgot nothing: on no task that was to be forgotten did right answers fall by more than "
        "luck.\n"
        "There is nothing to bring back. Unlearn harder first (more rmu.steps, a larger adaptive_scale)."
    )


def test_a_run_that_has_not_been_measured_is_refused(run: RunFolder) -> None:
    run.evaluation("unlearned").unlink()
    with pytest.raises(UserError) as caught:
        opened(run)
    assert plain(caught.value, run=run.path) == snapshot(
        "Run <run> has not measured unlearned, so there is nothing to hold an export against.\n"
        "Go on with it: --resume --name forgetful"
    )


def test_a_damaged_result_is_told(run: RunFolder) -> None:
    write_json(run.audit_result, ["no object"])
    with pytest.raises(UserError) as caught:
        opened(run).run([])
    assert plain(caught.value, run=run.path) == snapshot(
        "<run>/audit.json is damaged: it does not hold a JSON object.\n"
        "Audit it again: python -m lowmem_rmu audit <run> --again"
    )


def test_an_unknown_attack_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        Audit.choose(["relearnin"])
    assert plain(caught.value) == snapshot(
        'There is no attack "relearnin". Did you mean "relearning" or "requantisation" or "representation"?'
    )


def test_attacks_come_in_their_own_order() -> None:
    names = list(ATTACKS)
    assert [each.name for each in Audit.choose(names[::-1])] == names


def test_every_attack_foretells_time_and_memory(run: RunFolder) -> None:
    audit = opened(run)
    for each in ATTACKS.values():
        estimate = audit.estimate(each)
        assert each.lacks(audit.audited) or (estimate.seconds > 0 and estimate.bytes > 2**20), each.name


def test_training_takes_more_memory_than_answering_and_grows_with_the_batch(run: RunFolder) -> None:
    audited = opened(run).audited
    answering, small, large = (bytes_needed(audited, Cost(1, 1, batch)) for batch in (0, 512, 4096))
    assert answering <= small < large
