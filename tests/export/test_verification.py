import json
import re
import shutil
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gguf import GGUFWriter
from inline_snapshot import snapshot
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Role
from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.multiple_choice import Interrupted
from lowmem_rmu.export import verification
from lowmem_rmu.export.verification import (
    Checked,
    Compared,
    Mark,
    Verification,
    compare_export,
    mark_of,
    read_verification,
    room_needed,
    verification_tables,
    verify,
    worst,
)
from lowmem_rmu.model.loading import Quantisation
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import Answer
from tests.records import answer_row
from tests.texts import plain

CPU = torch.device("cpu")
TINY_MODEL = Path(__file__).parent.parent.parent / "lowmem_rmu/tiny/model"


def asked(role: Role, questions: int) -> list[QuestionSet]:
    return [QuestionSet("quiz", "things", role, None, (Question("?", ("a", "b", "c", "d"), 0),) * questions)]


def answers(marks: str) -> list[Answer]:
    """`+` is a right answer, `-` a wrong one."""
    return [
        answer_row(index=index, answer=0 if mark == "+" else 1, correct=mark == "+")
        for index, mark in enumerate(marks)
    ]


def compared(role: Role, base: str, unlearned: str, exported: str) -> Compared:
    return next(
        iter(compare_export(asked(role, len(base)), answers(base), answers(unlearned), answers(exported)))
    )


def test_a_verification_of_an_earlier_version_is_read_in_todays_words(tmp_path: Path) -> None:
    task = asdict(compared("forgotten", KNOWN[:8], GUESSED[:8], GUESSED[:8])) | {"finding": "cannot be told"}
    older = {
        "mark": "cannot be told",
        "checked": [
            {"name": "merged", "mark": "cannot be told", "reason": None, "seconds": 1.0, "tasks": [task]}
        ],
    }
    (tmp_path / "verification.json").write_text(json.dumps(older))
    found = read_verification(tmp_path)
    words = found["mark"], found["checked"][0]["mark"], found["checked"][0]["tasks"][0]["finding"]
    assert words == ("inconclusive", "inconclusive", "inconclusive")


KNOWN, GUESSED = "+" * 200, "+---" * 50


@pytest.mark.parametrize(
    ("base", "unlearned", "exported", "finding"),
    [
        (KNOWN, GUESSED, GUESSED, "survived"),
        (KNOWN, GUESSED, "-+--" * 50, "survived"),  # it guesses too, only otherwise
        (KNOWN, GUESSED, KNOWN, "came back"),
        (KNOWN, GUESSED, "+++-" * 25 + "++--" * 25, "came back"),  # half of what was forgotten
        (KNOWN, GUESSED, "+---" * 25 + "++--" * 25, "survived"),  # a sixth, and surely less than a quarter
        (KNOWN, GUESSED, "+---" * 10 + "++--" * 40, "inconclusive"),  # about a quarter
        # No question changed, but there are only eight.
        (
            KNOWN[:8],
            GUESSED[:8],
            GUESSED[:8],
            "inconclusive",
        ),
        (KNOWN, KNOWN, KNOWN, "nothing to tell"),
        # The fall in the run is within luck.
        (
            "+" * 100 + "-" * 100,
            "+" * 97 + "-" * 103,
            "-" * 200,
            "nothing to tell",
        ),
    ],
)
def test_what_was_forgotten_survives_or_comes_back(
    base: str, unlearned: str, exported: str, finding: str
) -> None:
    assert compared("forgotten", base, unlearned, exported).finding == finding


@pytest.mark.parametrize("role", ["kept", "adjacent", "measured"])
@pytest.mark.parametrize(
    ("unlearned", "exported", "finding"),
    [
        (KNOWN, KNOWN, "intact"),
        (KNOWN, "+" * 190 + "-" * 10, "intact"),
        (KNOWN, GUESSED, "lost"),
        (KNOWN, "+" * 160 + "-" * 40, "inconclusive"),
        (KNOWN[:8], KNOWN[:8], "inconclusive"),
        (GUESSED, GUESSED, "nothing to tell"),
        (GUESSED, KNOWN, "nothing to tell"),
    ],
)
def test_everything_else_stays_intact_or_is_lost(
    role: Role, unlearned: str, exported: str, finding: str
) -> None:
    assert compared(role, KNOWN[: len(unlearned)], unlearned, exported).finding == finding


def test_the_numbers_of_a_task() -> None:
    row = compared("forgotten", KNOWN, GUESSED, "++--" * 50)
    assert (row.base, row.unlearned, row.exported, row.change, row.questions) == (1.0, 0.25, 0.5, 0.25, 200)
    assert row.limit == pytest.approx(0.75 / 4)
    assert row.change_from < 0.25 < row.change_to
    assert row.p_against_unlearned == pytest.approx(2 / 2**50)
    assert row.p_against_base == pytest.approx(2 / 2**100)


SURVIVED, CAME_BACK = (
    compared("forgotten", KNOWN, GUESSED, GUESSED),
    compared("forgotten", KNOWN, GUESSED, KNOWN),
)
UNSURE, NOT_FORGOTTEN = (
    compared("forgotten", KNOWN[:8], GUESSED[:8], GUESSED[:8]),
    compared("forgotten", KNOWN, KNOWN, KNOWN),
)
INTACT, LOST = compared("kept", KNOWN, KNOWN, KNOWN), compared("kept", KNOWN, KNOWN, GUESSED)
GUESSING, FEW = compared("kept", KNOWN, GUESSED, GUESSED), compared("kept", KNOWN[:8], KNOWN[:8], KNOWN[:8])


@pytest.mark.parametrize(
    ("tasks", "mark"),
    [
        ([SURVIVED, INTACT], "verified"),
        ([SURVIVED, NOT_FORGOTTEN, INTACT, GUESSING, FEW], "verified"),
        ([SURVIVED, CAME_BACK, INTACT], "the update did not survive"),
        ([CAME_BACK, LOST], "the update did not survive"),
        ([SURVIVED, INTACT, LOST], "damaged"),
        ([LOST], "damaged"),
        ([SURVIVED, UNSURE, INTACT], "inconclusive"),
        ([SURVIVED], "inconclusive"),  # a file of noise has forgotten it too
        ([SURVIVED, GUESSING, FEW], "inconclusive"),
        ([NOT_FORGOTTEN, INTACT], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_the_mark_of_an_export(tasks: list[Compared], mark: Mark) -> None:
    assert mark_of(tasks) == mark


def test_of_several_ways_to_load_an_export_the_worst_counts() -> None:
    assert worst(["verified", None, "verified"]) == "verified"
    assert worst(["verified", "inconclusive"]) == "inconclusive"
    assert worst(["damaged", "the update did not survive", "verified"]) == "the update did not survive"
    assert worst([None]) == worst([]) == "inconclusive"


def marks(verified: Verification) -> dict[str, Mark | None]:
    return {each.name: each.mark for each in verified.checked}


def test_a_merged_model_is_asked_in_its_own_precision_and_quantised_again(
    forgetful: RunFolder, merged: Path
) -> None:
    heard: dict[str, list[int]] = {}

    def follow(name: str, sets: list[QuestionSet]) -> Any:
        return lambda done, accuracy: heard.setdefault(name, []).append(done)

    verified = verify(forgetful, merged, CPU, follow)
    assert marks(verified) == dict.fromkeys(["merged, bfloat16", "merged, NF4", "merged, int8"], "verified")
    assert verified.mark == "verified"
    assert [each.task for each in verified.checked[0].tasks] == [
        "compounds",
        "locks",
        "crystals",
        "subjects",
        "held_out",
    ]
    written = (merged / "verification.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(asdict(verified)))
    assert str(merged.parent) not in written
    assert {name: counts[-1] for name, counts in heard.items()} == dict.fromkeys(marks(verified), 300)
    assert all(each.seconds > 0 for each in verified.checked)


def test_the_adapter_on_the_base_answers_as_it_did_in_the_run(forgetful: RunFolder, adapter: Path) -> None:
    verified = verify(forgetful, adapter, CPU)
    assert marks(verified) == {"adapter on the base, NF4": "verified"}
    assert all(
        row.exported == row.unlearned and row.p_against_unlearned == 1 for row in verified.checked[0].tasks
    )


def test_a_merge_that_lost_the_update_is_seen(forgetful: RunFolder, tmp_path: Path) -> None:
    """What merging into a coarse checkpoint may come to: the base's own weights."""
    shutil.copytree(TINY_MODEL, tmp_path / "merged")
    verified = verify(forgetful, tmp_path / "merged", CPU)
    assert set(marks(verified).values()) == {"the update did not survive"} == {verified.mark}
    assert {row.finding for row in verified.checked[0].tasks} == {"came back", "intact"}


def test_a_checkpoint_that_was_damaged_is_not_taken_for_one_that_forgot(
    forgetful: RunFolder, merged: Path
) -> None:
    weights = load_file(merged / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(weight.shape, generator=generator).to(weight.dtype)
        for name, weight in weights.items()
    }
    save_file(noise, merged / "model.safetensors", metadata={"format": "pt"})
    verified = verify(forgetful, merged, CPU)
    assert set(marks(verified).values()) == {"damaged"} == {verified.mark}


def test_what_does_not_fit_is_not_loaded_and_says_why(
    forgetful: RunFolder, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "memory_available", lambda device: 2**20)
    verified = verify(forgetful, merged, CPU)
    assert verified.mark == "inconclusive"
    reasons = [each.reason or "" for each in verified.checked]
    assert {plain(reason, needed=re.search(r"\d+ MiB", reason)[0]) for reason in reasons} == snapshot(
        {"it needs <needed>, but 1 MiB are free on cpu"}
    )


def test_the_room_that_each_precision_needs(small_settings: ModelSettings) -> None:
    preset, own = load_preset("tiny", ["rmu.target_layer=3"]), small_settings
    for device, order in {"cpu": ["nf4", "none", "int8"], "cuda": ["nf4", "int8", "none"]}.items():
        needed = {
            each: room_needed(preset, ModelSpec(own), each, torch.device(device))
            for each in get_args(Quantisation)
        }
        assert sorted(needed, key=lambda each: needed[each]) == order


def test_running_out_of_memory_all_the_same_is_told(
    forgetful: RunFolder, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ModelSpec, "load", fail)
    assert verify(forgetful, adapter, CPU).checked[0].reason == snapshot("out of memory on cpu")


def test_a_stop_that_is_asked_for_ends_it(forgetful: RunFolder, adapter: Path) -> None:
    with pytest.raises(Interrupted):
        verify(forgetful, adapter, CPU, lambda name, sets: lambda done, accuracy: True)
    assert not (adapter / "verification.json").exists()


def write_gguf(path: Path, kind: str) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_gguf_files_that_cannot_be_asked_say_why(
    forgetful: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "llama_is_there", lambda: False)
    write_gguf(tmp_path / "model.gguf", "model")
    write_gguf(tmp_path / "lora.gguf", "adapter")
    verified = verify(forgetful, tmp_path, CPU)
    assert verified.mark == "inconclusive"
    assert {each.name: each.reason for each in verified.checked} == snapshot(
        {
            "lora.gguf": "an adapter alone, which llama.cpp puts on the base's own GGUF file",
            "model.gguf": "llama.cpp is not installed: pip install llama-cpp-python",
        }
    )


def test_a_folder_without_an_export(forgetful: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        verify(forgetful, tmp_path, CPU)
    assert plain(caught.value, folder=tmp_path) == snapshot(
        "<folder> holds neither an adapter nor a checkpoint nor GGUF files.\n"
        "Give the folder that was exported to."
    )


@pytest.fixture
def copied(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "copied")))


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_a_run_that_has_not_measured_both_sides(copied: RunFolder, adapter: Path, side: str) -> None:
    copied.evaluation(side).unlink()
    with pytest.raises(UserError) as caught:
        verify(copied, adapter, CPU)
    assert plain(caught.value, run=copied.path, side=side) == snapshot(
        "Run <run> has not measured <side>, so there is nothing to hold an export against.\n"
        "Go on with it: --resume --name copied"
    )


def test_questions_that_have_changed_since_the_run(copied: RunFolder, adapter: Path) -> None:
    config = copied.config
    config["settings"]["evaluation"]["limit"] = 50
    (copied.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        verify(copied, adapter, CPU)
    assert plain(caught.value, run=copied.path) == snapshot(
        "The questions of run <run> have changed since it asked base.\n"
        "Put the old ones back, or make the run again."
    )


def shown(verified: Verification) -> str:
    output = StringIO()
    Console(file=output, width=80).print(verification_tables(verified))
    return output.getvalue()


def test_a_run_without_questions_cannot_tell(copied: RunFolder, adapter: Path) -> None:
    config = copied.config
    config["settings"]["evaluation"]["tasks"] = {}
    (copied.path / "config.json").write_text(json.dumps(config))
    for side in ("base", "unlearned"):
        copied.answers(side).write_text("")
        copied.evaluation(side).write_text(json.dumps({"tasks": {}, "groups": {}}))
    verified = verify(copied, adapter, CPU)
    assert verified == Verification("inconclusive", ())
    assert shown(verified) == snapshot("The export: inconclusive (the run asked no questions)\n")


def test_the_table_shows_every_number_and_why_something_is_missing() -> None:
    checked = (
        Checked(
            "merged, bfloat16",
            "the update did not survive",
            None,
            1.0,
            (replace(CAME_BACK, task="[bold]quiz"), INTACT),
        ),
        Checked("merged, int8", None, "out of memory on cuda", 0.0, ()),
    )
    text = shown(Verification("the update did not survive", checked))
    assert plain(text) == snapshot(
        "merged, bfloat16: the update did not survive\n"
        "\n"
        " Task               Base    Unlearned     Exported    Change (95%)  Found\n"
        " ────────────────────────────────────────────────────────────────────────────\n"
        " [bold]quiz  100.0 ± 0.0   25.0 ± 3.1  100.0 ± 0.0  +68.2 to +80.4  came back\n"
        " quiz        100.0 ± 0.0  100.0 ± 0.0  100.0 ± 0.0    -1.0 to +1.0  intact\n"
        "\n"
        "merged, int8: not asked: out of memory on cuda\n"
        "\n"
        "The export: the update did not survive\n"
    )
