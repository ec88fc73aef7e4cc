import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import (
    add_lines,
    folder_replaced,
    number_in,
    read_lines,
    remove_leftovers,
    write_atomically,
    write_json,
    write_lines,
)
from lowmem_rmu.runs.folder import RunFolder, present
from lowmem_rmu.runs.processes import CLOCK_SECONDS, STALE_SECONDS, living_process
from lowmem_rmu.runs.records import StageCost, file_digest
from lowmem_rmu.runs.status import Stopped
from tests.texts import plain


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
    assert plain(caught.value, runs=tmp_path) == snapshot(
        "Run <runs>/mine exists already.\nChoose another --name, or go on with it: --resume --name mine"
    )


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".", "", ".hidden", "-x", "a\\b", "/tmp/x", "a b", "a\n", "ü", "a" * 101]
)
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    for use in (RunFolder.create, RunFolder.open):
        with pytest.raises(UserError) as caught:
            use(tmp_path / "runs", name)
        assert str(caught.value).startswith(f'"{name}" ')
        rest = str(caught.value).removeprefix(f'"{name}" ')
        assert plain(rest, runs=tmp_path / "runs") == snapshot(
            'cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most 100, and no '
            "name of a Windows device, so that it stays inside <runs>."
        )
    assert list(tmp_path.iterdir()) == []


def test_a_generated_name_is_a_valid_one(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, RunFolder.new_name("zephyr-7b")).path.is_dir()


def test_a_place_that_cannot_be_written_is_named_with_the_option_that_changes_it(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path / "runs", "mine")
    assert plain(caught.value, run=tmp_path / "runs/mine", runs=tmp_path / "runs") == snapshot(
        "Run folder <run> cannot be written: File exists.\nChoose another place with --runs-dir."
    )


def test_opening_an_unknown_run_suggests_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path, "tiny-20261121")
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, "tiny-20261122")
    assert plain(caught.value, runs=tmp_path) == snapshot(
        'There is no run tiny-20261122 in <runs>. Did you mean "tiny-20261121"?'
    )


def test_opening_a_run_where_there_are_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()  # no config.json: no run
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, "half")
    assert plain(caught.value, runs=tmp_path) == snapshot(
        "There is no run half in <runs>. It holds no runs yet."
    )


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, name in ((300, "a"), (100, "b"), (200, "c")):
        os.utime(make_run(tmp_path, name).path / "config.json", (time.time() - age,) * 2)
    (tmp_path / "no-run").mkdir()
    assert [run.path.name for run in RunFolder.all(tmp_path)] == ["b", "c", "a"]
    assert RunFolder.all(tmp_path / "missing") == []


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_an_interrupt_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert run.read_status() is None
    before = time.time()
    run.write_status("unlearn", 3, 150, "failed", error="out of memory", began=before)
    status = vars(run.read_status())
    assert before <= status.pop("heartbeat") <= time.time()
    assert status.pop("stage_began") == before
    assert status.pop("started") == psutil.Process().create_time()
    assert status == {
        "stage": "unlearn",
        "step": 3,
        "total": 150,
        "state": "failed",
        "pid": os.getpid(),
        "error": "out of memory",
        "problem": None,
        "fix": None,
        "action": None,
    }


def test_evaluations_and_stages_are_none_until_they_are_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert run.read_evaluation("base") is None
    assert run.read_stages() == []
    write_json(run.evaluation("base"), {"tasks": {}})
    (run.path / "stages.json").write_text(json.dumps([vars(cost := StageCost("unlearn", 1.5, None))]))
    assert run.read_evaluation("base") == {"tasks": {}}
    assert run.read_stages() == [cost]
    assert run.answers("base").parent == run.evaluation("base").parent
    assert run.has_results


def test_the_stop_file_asks_for_a_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert not run.stop_asked
    (run.path / "stop").touch()
    assert run.stop_asked


def scored_run(tmp_path: Path) -> RunFolder:
    """A run that has asked three questions."""
    run = make_run(tmp_path, "mine")
    row = {
        "task": "quiz",
        "prompt": "f00",
        "logprobs": [-1.0, -2.0, -3.0, -4.0],
        "answer": 0,
        "gold": 0,
        "correct": True,
    }
    write_lines(run.answers("base"), [row | {"index": index} for index in range(3)])
    write_json(
        run.evaluation("base"),
        {"tasks": {"quiz": {"questions": 3}}, "answers_sha256": file_digest(run.answers("base"))},
    )
    return run


def test_answers_that_lost_a_line_or_flipped_a_bit_are_noticed(tmp_path: Path) -> None:
    run = scored_run(tmp_path)
    assert len(run.read_answers("base")) == 3
    whole = run.answers("base").read_text()
    for content, said in (
        (
            "".join(whole.splitlines(keepends=True)[:2]),
            snapshot(
                "<run>/evaluation/answers_base.jsonl is damaged: it holds 2 answers, but 3 were scored.\n"
                "Delete it and <run>/evaluation/base.json, and have the questions asked again: --resume "
                "--name mine"
            ),
        ),
        (
            whole[:-20],
            snapshot(
                "<run>/evaluation/answers_base.jsonl is damaged: it holds 2 answers, but 3 were scored.\n"
                "Delete it and <run>/evaluation/base.json, and have the questions asked again: --resume "
                "--name mine"
            ),
        ),
        (
            whole.replace("-4.0", "-4.5", 1),
            snapshot(
                "<run>/evaluation/answers_base.jsonl is damaged, or was changed: its sha256 is not the one "
                "that the run recorded.\n"
                "Delete it and <run>/evaluation/base.json, and have the questions asked again: --resume "
                "--name mine"
            ),
        ),
        (
            whole.replace("-4.0", "-4x0", 1),
            snapshot(
                "<run>/evaluation/answers_base.jsonl, line 1, is damaged: it does not hold a JSON object.\n"
                "Delete it and <run>/evaluation/base.json, and have the questions asked again: --resume "
                "--name mine"
            ),
        ),
    ):
        run.answers("base").write_text(content)
        with pytest.raises(UserError) as caught:
            run.read_answers("base")
        assert plain(caught.value, run=run.path) == said


def test_answers_of_an_older_version_are_counted(tmp_path: Path) -> None:
    run = scored_run(tmp_path)
    write_json(run.evaluation("base"), {"tasks": {"quiz": {"questions": 3}}})
    assert len(run.read_answers("base")) == 3
    run.answers("base").write_text(run.answers("base").read_text().partition("\n")[0] + "\n")
    with pytest.raises(UserError) as caught:
        run.read_answers("base")
    assert plain(caught.value, run=run.path) == snapshot(
        "<run>/evaluation/answers_base.jsonl is damaged: it holds 1 answers, but 3 were scored.\n"
        "Delete it and <run>/evaluation/base.json, and have the questions asked again: --resume --name mine"
    )


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps its own permissions")
def test_a_run_folder_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = RunFolder.create(tmp_path / "runs", "mine")
    finally:
        os.umask(before)
    assert (run.path.stat().st_mode & 0o777, run.path.parent.stat().st_mode & 0o777) == (0o700, 0o755)


# The process of a run


def test_the_process_that_wrote_a_status_is_found_as_long_as_it_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert run.writer is None
    for state, lives in (("running", True), ("done", False), ("waiting", False)):
        run.write_status("unlearn", 0, 0, state)
        assert (run.writer is not None) == lives


def test_a_pid_that_belongs_to_another_process_by_now_is_not_the_run_s(tmp_path: Path) -> None:
    """As after a kill, or in a container where every process gets the same few pids."""
    run = make_run(tmp_path, "mine")
    run.write_status("unlearn", 0, 0, "running")
    write_json(
        run.path / "status.json", vars(run.read_status()) | {"started": psutil.Process().create_time() - 60}
    )
    assert run.writer is None


def test_a_process_is_known_by_its_start() -> None:
    own, now = psutil.Process().create_time(), time.time()
    assert living_process(os.getpid(), own) == psutil.Process()
    assert living_process(os.getpid(), own + CLOCK_SECONDS + 1) is None
    # Without a start time: it cannot have written before it started, nor is it silent for hours.
    assert living_process(os.getpid(), None, heartbeat=now) == psutil.Process()
    assert living_process(os.getpid(), None, heartbeat=own - CLOCK_SECONDS - 1) is None
    assert living_process(os.getpid(), None, heartbeat=now - STALE_SECONDS - 1) is None


@pytest.mark.parametrize("pid", [-1, 2**31 - 1, 10**30])
def test_what_is_no_pid_belongs_to_no_process(pid: int) -> None:
    assert living_process(pid, time.time()) is None


@pytest.mark.parametrize("value", ["1", None, True, float("nan"), float("inf"), 10**400, [1]])
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    assert number_in({"pid": value}, "pid") is None
    assert number_in({"pid": 7}, "pid") == 7
    assert number_in([value], "pid") is None


@pytest.mark.parametrize("content", ["[]", "7", "null", '{"pid": 1', "[" * 100_000, b"\xff"])
def test_a_damaged_status_says_nothing(tmp_path: Path, content: str | bytes) -> None:
    run = make_run(tmp_path, "mine")
    (run.path / "status.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run.read_status() is None
    assert run.writer is None


# After a kill


def test_what_a_killed_start_left_does_not_take_the_name(tmp_path: Path) -> None:
    left = RunFolder.create(tmp_path, "mine")
    (left.path / ".config.json.new").write_text('{"pre')
    (left.path / "evaluation/batch_tokens.json").write_text("64")
    (left.path / "evaluation/.answers_base.jsonl.new").write_text("")
    assert left.is_leftover
    assert list(RunFolder.create(tmp_path, "mine").path.rglob("*")) == [left.path / "evaluation"]


@pytest.mark.parametrize(
    "name", ["config.json", "output.txt", "notes.txt", "evaluation/notes.txt", "adapter/x", "metrics.jsonl"]
)
def test_a_folder_that_holds_anything_else_keeps_its_name(tmp_path: Path, name: str) -> None:
    run = RunFolder.create(tmp_path, "mine")
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).write_text("{}")
    assert not run.is_leftover
    if name != "output.txt":  # a reserved folder is there for its run
        with pytest.raises(UserError) as caught:
            RunFolder.create(tmp_path, "mine")
        assert plain(caught.value, runs=tmp_path) == snapshot(
            "Run <runs>/mine exists already.\nChoose another --name, or go on with it: --resume --name mine"
        )
    assert (run.path / name).exists()


def test_leftovers_go_and_what_was_moved_away_comes_back(tmp_path: Path) -> None:
    for name in (
        ".half.json.new",
        ".adapter.new/x",
        ".moved.old/x",
        ".replaced.old/x",
        "replaced/y",
        ".hidden/x",
        "kept.new",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.new", "moved", "replaced"]
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["x"]


def test_a_row_after_a_torn_one_is_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for row in ({"a": 1}, {"a": "ü"}):
        add_lines(path, [row])
    path.write_bytes(path.read_bytes()[:-4])
    add_lines(path, [{"a": 3}])
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_deletion_that_is_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "mine")
    for name in ("a.json", "z.json", "adapter"):
        (run.path / name).write_text("")
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run.remove()
            assert [each.path for each in RunFolder.all(tmp_path)] == [run.path]
    run.remove()
    assert list(tmp_path.iterdir()) == []


def test_work_whose_folder_is_deleted_ends_with_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    with pytest.raises(FileNotFoundError), present(run.path):
        (run.path / "missing").read_text()
    for error in (UserError("So."), Stopped(run.path)):
        with pytest.raises(type(error)), present(run.path):
            raise error
    with pytest.raises(UserError) as caught, present(run.path):  # noqa: PT012
        run.remove()
        add_lines(run.metrics, [{}])
    assert plain(caught.value, run=run.path) == snapshot(
        "The folder <run> was deleted or moved while it was in use.\nThe work on it has ended."
    )


def test_a_run_that_is_deleted_while_runs_are_listed_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kept", "deleted"):
        make_run(tmp_path, name)

    def meanwhile(path: Path) -> bool:
        if path.name == "deleted":
            shutil.rmtree(path)
        return False

    monkeypatch.setattr(Path, "is_symlink", meanwhile)
    assert [run.path.name for run in RunFolder.all(tmp_path)] == ["kept"]


def test_notes_are_kept_by_what_they_are_about(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine")
    assert run.read_notes() == {}
    run.note("guard", ["First."])
    run.note("texts", ["Second.", "Third."])
    run.note("guard", ["Instead."])
    assert run.read_notes() == {"guard": ["Instead."], "texts": ["Second.", "Third."]}
    run.notes.write_text("[1]")
    with pytest.raises(UserError) as caught:
        run.read_notes()
    assert str(run.notes) in str(caught.value)
