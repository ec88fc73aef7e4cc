import json
import os
import time
from pathlib import Path

import pytest

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs import RunFolder, folder_replaced, read_lines, write_atomically, write_json, write_lines


def make_run(runs_dir: Path, name: str) -> RunFolder:
    run = RunFolder.create(runs_dir, name)
    write_json(run.path / "config.json", {"preset": name})
    return run


def test_a_created_run_opens_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "tiny-1")
    assert run.path == tmp_path / "runs/tiny-1"
    assert (run.path / "evaluation").is_dir()
    assert RunFolder.open(tmp_path / "runs", "tiny-1") == run
    assert run.config == {"preset": "tiny-1"}
    assert not run.has_results


def test_a_name_that_is_taken_is_refused_with_the_way_on(tmp_path: Path) -> None:
    make_run(tmp_path, "mine")
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path, "mine")
    assert str(caught.value) == f"Run {tmp_path / 'mine'} exists already.\nChoose another --name, or go on with it: --resume --name mine"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", ".hidden", "-x", "a\\b", "/tmp/x", "a b", "a\n", "ü", "a" * 101])
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    for use in (RunFolder.create, RunFolder.open):
        with pytest.raises(UserError) as caught:
            use(tmp_path / "runs", name)
        assert str(caught.value).startswith(f'"{name}" cannot be the name of a run: use letters, digits')
        assert str(tmp_path / "runs") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_generated_name_is_a_valid_one(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, RunFolder.new_name("zephyr-7b")).path.is_dir()


def test_a_place_that_cannot_be_written_is_named_with_the_option_that_changes_it(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path / "runs", "mine")
    assert str(caught.value).startswith(f"Run folder {tmp_path / 'runs/mine'} cannot be written: ")
    assert str(caught.value).endswith("Choose another place with --runs-dir.")


def test_opening_an_unknown_run_suggests_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path, "tiny-20261121")
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, "tiny-20261122")
    assert str(caught.value) == f'There is no run tiny-20261122 in {tmp_path}. Did you mean "tiny-20261121"?'


def test_opening_a_run_where_there_are_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()  # no config.json: no run
    with pytest.raises(UserError, match="There is no run half in .* It holds no runs yet."):
        RunFolder.open(tmp_path, "half")


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, name in ((300, "a"), (100, "b"), (200, "c")):
        os.utime(make_run(tmp_path, name).path / "config.json", (time.time() - age,) * 2)
    (tmp_path / "no-run").mkdir()
    assert [run.path.name for run in RunFolder.all(tmp_path)] == ["b", "c", "a"]
    assert RunFolder.all(tmp_path / "missing") == []


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", "old")
    write_atomically(tmp_path / "x", "new ü")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new ü"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["a\nb", "line\u2028separator", "next\x85line", "\x0b\x0c\x1c", "ü"])
def test_lines_come_back_whatever_they_hold(tmp_path: Path, text: str) -> None:
    rows = [{"answer": text}, {"answer": "next"}]
    write_lines(tmp_path / "x.jsonl", rows)
    assert read_lines(tmp_path / "x.jsonl") == rows


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "x.jsonl") == []


def test_a_folder_is_replaced_once_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for content in ("old", "new"):
        with folder_replaced(folder) as beside:
            assert list(beside.iterdir()) == []
            (beside / content).write_text(content)
            assert content == "old" or (folder / "old").exists()
        assert [path.name for path in folder.iterdir()] == [content]
        assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_was_not_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), folder_replaced(folder) as beside:  # noqa: PT012
        (beside / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_interrupt_between_the_two_renames_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == ".adapter.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), folder_replaced(folder) as beside:
        (beside / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_leftovers_of_a_killed_process_are_no_part_of_the_new_folder(tmp_path: Path) -> None:
    (tmp_path / ".adapter.new").mkdir()
    (tmp_path / ".adapter.new/left over").write_text("x")
    with folder_replaced(tmp_path / "adapter") as beside:
        assert list(beside.iterdir()) == []


def test_metrics_are_appended_and_cut_to_the_steps_that_count(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    run.truncate_metrics(2)
    assert not run.metrics.exists()
    for step in range(1, 6):
        run.add_metrics({"step": step, "loss": 0.5})
    assert run.has_results
    run.truncate_metrics(3)
    run.add_metrics({"step": 4, "loss": 0.25})
    assert [row["step"] for row in read_lines(run.metrics)] == [1, 2, 3, 4]


def test_status_comes_back_with_process_and_heartbeat(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert run.read_status() == {}
    before = time.time()
    run.write_status("unlearn", 3, 150, "failed", error="out of memory", began=before)
    status = run.read_status()
    assert before <= status.pop("heartbeat") <= time.time()
    assert status.pop("stage_began") == before
    assert status == {"stage": "unlearn", "step": 3, "total": 150, "state": "failed", "pid": os.getpid(), "error": "out of memory"}


def test_evaluations_and_stages_are_none_until_they_are_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert run.read_evaluation("base") is None
    assert run.read_stages() == []
    write_json(run.evaluation("base"), {"tasks": {}})
    (run.path / "stages.json").write_text(json.dumps([{"stage": "unlearn"}]))
    assert run.read_evaluation("base") == {"tasks": {}}
    assert run.read_stages() == [{"stage": "unlearn"}]
    assert run.answers("base").parent == run.evaluation("base").parent
    assert run.has_results


def test_the_stop_file_asks_for_a_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert not run.stop_asked
    (run.path / "stop").touch()
    assert run.stop_asked
