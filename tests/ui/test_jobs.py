"""Runs as processes: what their folders, numbers and processes tell of them, and what is done to them. The processes are real."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import psutil
import pytest
import yaml
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import UserError, readable
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket, tickets
from lowmem_rmu.ui import jobs
from tests.texts import plain
from tests.waiting import wait_until

TAKEN = snapshot("Run taken exists already.\nChoose another name.")
PYTHON = sys.executable
Sleeper = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Starts processes that do nothing for a while."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([PYTHON, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Whatever `jobs` starts from now on is a real process that only does what the given lines say; gives its runs folder."""
    if os.name != "posix":
        pytest.skip("needs a script that can be started as a program")
    runs_dir, program = tmp_path / "runs", tmp_path / "program"

    def stands_in(lines: str) -> Path:
        program.write_text(
            f"#!{PYTHON}\nimport signal, sys, time\nfrom pathlib import Path\n{lines}\n", encoding="utf-8"
        )
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        return runs_dir

    yield stands_in
    for ticket in tickets(runs_dir):
        if process := ticket.process:
            process.kill()


def make_run(
    runs_dir: Path, name: str, status: dict[str, Any] | None = None, age: float = 0, **config: Any
) -> RunFolder:
    """A run with a config.json, of so many seconds ago."""
    run = RunFolder.create(runs_dir, name)
    settings = load_preset("tiny", ["rmu.steps=10"]).model_dump()
    write_json(run.path / "config.json", {"preset": "tiny", "device": "cpu", "settings": settings} | config)
    os.utime(run.path / "config.json", (time.time() - age,) * 2)
    if status:
        write_status(run, **status)
    return run


def write_status(run: RunFolder, **status: Any) -> None:
    whole = {
        "stage": "unlearn",
        "step": 0,
        "total": 0,
        "state": "running",
        "pid": 0,
        "heartbeat": 0.0,
        "error": None,
        "stage_began": None,
    }
    write_json(run.path / "status.json", whole | status)


def queue(runs_dir: Path, name: str, process: subprocess.Popen[bytes]) -> None:
    with one_at_a_time(runs_dir):
        take_ticket(runs_dir, name, process.pid)


def mistake(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# Names


def test_a_run_without_a_name_gets_its_preset_the_time_and_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs.reserve(tmp_path, "zephyr-7b", None).path.name.startswith("zephyr-7b-20")
    # All within a second.
    monkeypatch.setattr(RunFolder, "new_name", staticmethod(lambda preset: f"{preset}-20270101-000000"))
    make_run(tmp_path, "tiny-20270101-000000-3")
    found = [jobs.reserve(tmp_path, "tiny", None).path.name for _ in range(3)]
    assert found == ["tiny-20270101-000000", "tiny-20270101-000000-2", "tiny-20270101-000000-4"]


def test_runs_that_are_asked_for_at_once_share_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "new_name", staticmethod(lambda preset: preset))
    found, barrier = list[str](), Barrier(6)

    def ask() -> None:
        barrier.wait()
        found.append(jobs.reserve(tmp_path, "tiny", None).path.name)

    threads = [Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["tiny", *(f"tiny-{number}" for number in range(2, 7))]


def test_a_reserved_folder_waits_for_its_run(tmp_path: Path) -> None:
    folder = jobs.reserve(tmp_path / "runs", "tiny", "mine")
    assert folder.path == tmp_path / "runs/mine"
    assert folder.is_reserved
    assert jobs.find(tmp_path / "runs", "mine") == folder


@pytest.mark.parametrize("reserved", [True, False])
def test_a_name_that_is_taken_is_refused_in_the_words_of_the_page(tmp_path: Path, reserved: bool) -> None:
    jobs.reserve(tmp_path, "tiny", "taken") if reserved else make_run(tmp_path, "taken", {"state": "done"})
    other = make_run(tmp_path, "other", {"state": "done"})
    assert mistake(jobs.reserve, tmp_path, "tiny", "taken") == TAKEN
    assert mistake(jobs.rename, other, "taken") == TAKEN
    assert mistake(jobs.rename, other, "other").replace("other", "taken", 1) == TAKEN
    assert other.path.exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "..", "a/b", "a b", "a" * 101, "x" * 5000, "nul", "x\0y", "", ".queue", "ü", "<b>"],
)
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "runs", "mine", {"state": "done"})
    for said in (mistake(jobs.reserve, tmp_path / "runs", "tiny", name), mistake(jobs.rename, run, name)):
        shown = readable(f'"{name}"')  # shortened, and without what a terminal takes for a command
        assert said.startswith(f"{shown} ")
        assert plain(said.removeprefix(f"{shown} "), runs=tmp_path / "runs") == snapshot(
            'cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most 100, and no '
            "name of a Windows device, so that it stays inside <runs>."
        )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".queue", "mine"]


def test_finding_says_what_is_not_there(tmp_path: Path) -> None:
    for nothing in (None, ""):
        assert mistake(jobs.find, tmp_path, nothing) == snapshot("Choose a run first.")
    make_run(tmp_path, "mine")
    assert plain(mistake(jobs.find, tmp_path, "mind"), runs=tmp_path) == snapshot(
        'There is no run mind in <runs>. Did you mean "mine"?'
    )
    assert mistake(jobs.find, tmp_path, "../mine").startswith('"../mine" ')


def test_runs_under_way_come_first_and_in_their_order_then_the_newest(
    tmp_path: Path, sleeper: Sleeper
) -> None:
    make_run(tmp_path, "old", {"state": "done"}, age=900)
    refused = jobs.reserve(tmp_path, "tiny", "refused")
    os.utime(refused.output, (time.time() - 600,) * 2)
    make_run(tmp_path, "new", {"state": "done"}, age=300)
    for age, name in ((1200, "running"), (60, "waits")):
        make_run(tmp_path, name, age=age)
        queue(tmp_path, name, sleeper())
    queue(tmp_path, "from-a-terminal", sleeper())  # has no folder before its turn
    assert jobs.names(tmp_path) == ["running", "waits", "new", "refused", "old"]
    assert jobs.names(tmp_path / "nowhere") == []


def test_a_folder_that_no_run_can_be_called_is_none(tmp_path: Path) -> None:
    """Such as a copy that a file manager made, or a link to another place."""
    runs_dir = tmp_path / "runs"
    make_run(runs_dir, "mine")
    make_run(runs_dir, "copied").path.rename(runs_dir / "mine (copy)")
    jobs.reserve(runs_dir, "tiny", "begun").path.rename(runs_dir / "<b>begun")
    (runs_dir / "link").symlink_to(make_run(tmp_path / "elsewhere", "other").path)
    assert jobs.names(runs_dir) == ["mine"]


# States


def test_a_reserved_folder_that_nobody_goes_through_has_failed(tmp_path: Path) -> None:
    state = jobs.state_of(jobs.reserve(tmp_path, "tiny", "mine"))
    assert (state.state, state.is_live, state.words) == ("failed", False, snapshot("failed"))


def test_a_refused_run_tells_why(tmp_path: Path) -> None:
    folder = jobs.reserve(tmp_path, "tiny", "mine")
    folder.write_status("prepare", 0, 0, "failed", "Too little memory.")
    state = jobs.state_of(folder)
    assert (state.state, state.stage, state.error) == ("failed", "prepare", "Too little memory.")


def test_a_run_that_died_while_it_waited_was_interrupted(tmp_path: Path, sleeper: Sleeper) -> None:
    folder = jobs.reserve(tmp_path, "tiny", "mine")
    write_status(folder, state="waiting", stage="queue")
    process = sleeper()
    queue(tmp_path, "mine", process)
    assert jobs.state_of(folder).state == "starting"
    process.kill()
    process.wait()
    state = jobs.state_of(folder)
    assert (state.state, state.is_live, state.words) == (
        "interrupted",
        False,
        snapshot("interrupted; it can go on"),
    )


def test_the_queue_tells_who_starts_and_who_waits(tmp_path: Path, sleeper: Sleeper) -> None:
    runs = [make_run(tmp_path, name, {"state": "waiting", "stage": "queue"}) for name in ("a", "b", "c")]
    for run in runs:
        queue(tmp_path, run.path.name, sleeper())
    states = [jobs.state_of(run) for run in runs]
    assert [state.words for state in states] == snapshot(
        ["starting", "waiting: 1 run before it", "waiting: 2 runs before it"]
    )
    assert [state.place for state in states] == [0, 1, 2]
    assert all(state.is_live for state in states)


def test_a_run_with_the_device_is_where_its_status_says(tmp_path: Path, sleeper: Sleeper) -> None:
    run, process = make_run(tmp_path, "mine"), sleeper()
    queue(tmp_path, "mine", process)
    assert jobs.state_of(run).state == "starting"
    for state in ("stopped", "failed", "interrupted"):  # it goes on, and has not said so yet
        write_status(run, state=state)
        assert jobs.state_of(run).state == "starting"
    write_status(run, stage="evaluate-base", step=30, total=90, stage_began=100.0, heartbeat=115.0)
    assert jobs.state_of(run) == jobs.RunState("mine", "running", "evaluate-base", 30, 90, 0, 30.0, None)
    process.kill()
    process.wait()
    assert jobs.state_of(run).state == "interrupted"


def test_a_process_without_a_number_is_known_by_its_pid(tmp_path: Path, sleeper: Sleeper) -> None:
    """Those that `accelerate launch` starts take none."""
    process = sleeper()
    run = make_run(
        tmp_path, "mine", {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    )
    assert jobs.state_of(run).state == "running"
    process.kill()
    process.wait()
    assert jobs.state_of(run).state == "interrupted"


@pytest.mark.parametrize("started", [1.0, None])
def test_a_killed_run_whose_pid_another_process_has_is_interrupted(
    tmp_path: Path, sleeper: Sleeper, started: float | None
) -> None:
    """It can be resumed, renamed and deleted, and there is nothing to stop. `started` is missing in older status files."""
    run = make_run(
        tmp_path, "mine", {"pid": sleeper().pid, "heartbeat": time.time() - 60, "started": started}
    )
    assert jobs.state_of(run).state == "interrupted"
    assert plain(mistake(jobs.stop, run)) == snapshot("Run mine is not under way.")
    jobs.delete(jobs.rename(run, "other"))
    assert jobs.names(tmp_path) == []


@pytest.mark.parametrize("state", ["stopped", "failed", "done"])
def test_a_run_that_rests_is_what_it_said_last(tmp_path: Path, state: str) -> None:
    told = jobs.state_of(
        make_run(
            tmp_path,
            "mine",
            {"state": state, "step": 7, "total": 10, "error": "So." if state == "failed" else None},
        )
    )
    assert (told.state, told.is_live, told.step, told.total, told.words) == (
        state,
        False,
        7,
        10,
        jobs.STATES[state],
    )
    assert told.error == ("So." if state == "failed" else None)
    assert told.seconds_left is None


@pytest.mark.parametrize("content", [None, "", '{"state": "runn', "\0" * 40])
def test_a_status_that_a_power_cut_tore_says_nothing(tmp_path: Path, content: str | None) -> None:
    run = make_run(tmp_path, "mine")
    if content is not None:
        (run.path / "status.json").write_text(content)
    assert jobs.state_of(run).state == "interrupted"


def test_training_time_is_told_by_the_last_steps(tmp_path: Path, sleeper: Sleeper) -> None:
    run = make_run(tmp_path, "mine", {"step": 30, "total": 50})
    queue(tmp_path, "mine", sleeper())
    assert jobs.state_of(run).seconds_left is None, "no step is told yet"
    for step in range(30):
        run.add_metrics({"step": step + 1, "seconds": 100.0 if step < 10 else 0.5})
    assert jobs.state_of(run).seconds_left == pytest.approx(20 * 0.5)
    write_status(run, stage="evaluate-unlearned", total=90, stage_began=time.time())
    assert jobs.state_of(run).seconds_left is None, "no question is answered yet"


# Starting and going on


def test_a_started_run_has_its_settings_beside_it_and_a_number(stand_in: Callable[[str], Path]) -> None:
    runs_dir = stand_in("print(sys.argv[1:], flush=True)\ntime.sleep(60)")
    preset = load_preset("tiny", ["rmu.steps=4", "title=Vergiß <b>"])
    folder = jobs.reserve(runs_dir, "tiny", "mine")
    (folder.path / "stop").touch()
    jobs.start(folder, "tiny", preset, "cpu")
    assert load_preset(str(folder.path / "tiny.yaml")) == preset
    assert not folder.stop_asked, "an older stop was for an older process"
    [ticket] = tickets(runs_dir)
    assert (ticket.name, jobs.state_of(folder).state) == ("mine", "starting")
    assert ticket.process is not None
    assert ticket.process.nice() == jobs.NICENESS
    assert os.getsid(ticket.pid) == ticket.pid, "Ctrl-C in the app's terminal is not for the run"
    wait_until(lambda: folder.output.read_text(), "nothing was printed")
    yaml_file, runs = str(folder.path / "tiny.yaml"), str(runs_dir)
    printed = ["-m", "lowmem_rmu.run", yaml_file, "--name", "mine", "--runs-dir", runs, "--device", "cpu"]
    assert folder.output.read_text().strip() == str(printed)


def test_a_reserved_run_that_never_began_is_started_anew(stand_in: Callable[[str], Path]) -> None:
    runs_dir = stand_in("print(sys.argv[1:], flush=True)")
    folder = jobs.reserve(runs_dir, "tiny", "mine")
    (folder.path / "tiny.yaml").write_text(yaml.safe_dump(load_preset("tiny").model_dump()))
    jobs.resume(folder)
    wait_until(lambda: folder.output.read_text(), "nothing was printed")
    assert "--resume" not in folder.output.read_text()
    assert "'--device', 'auto'" in folder.output.read_text()


def test_a_reserved_folder_without_settings_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    folder = jobs.reserve(tmp_path, "tiny", "mine")
    assert plain(mistake(jobs.resume, folder)) == snapshot(
        "Run mine holds no settings to go on with.\nDelete it, and start a new one."
    )
    assert tickets(tmp_path) == []


def test_a_run_goes_on_with_the_settings_it_was_started_with(stand_in: Callable[[str], Path]) -> None:
    runs_dir = stand_in("print(sys.argv[1:], flush=True)\ntime.sleep(60)")
    run = make_run(runs_dir, "mine", {"state": "stopped"})
    (run.path / "stop").touch()
    jobs.resume(run)
    wait_until(lambda: run.output.exists() and run.output.read_text(), "nothing was printed")
    assert run.output.read_text().strip().endswith("'--device', 'cpu', '--resume']")
    assert load_preset(str(run.path / "tiny.yaml")).rmu.steps == 10
    assert not run.stop_asked
    assert plain(mistake(jobs.resume, run)) == snapshot("Run mine is under way already.")
    assert len(tickets(runs_dir)) == 1


def test_settings_of_another_version_are_told_before_anything_starts(stand_in: Callable[[str], Path]) -> None:
    runs_dir = stand_in("time.sleep(60)")
    settings = load_preset("tiny").model_dump()
    settings["rmu"]["warmth"] = 3
    run = make_run(runs_dir, "mine", {"state": "stopped"}, settings=settings)
    assert plain(mistake(jobs.resume, run), run=run.path) == snapshot(
        "<run> was written by another version of lowmem-rmu: this one does not know its settings of "
        "rmu.warmth.\n"
        "Read it with the version that its config.json names, or make the run again."
    )
    assert (tickets(runs_dir), jobs.state_of(run).state) == ([], "stopped")


def test_a_finished_run_is_not_run_again(
    stand_in: Callable[[str], Path], forgetful: RunFolder, tmp_path: Path
) -> None:
    runs_dir = stand_in("time.sleep(60)")
    run = RunFolder(Path(shutil.copytree(forgetful.path, runs_dir / "mine")))
    assert plain(mistake(jobs.resume, run)) == snapshot(
        "Run mine is finished: nothing of it is left to do.\nSee its results, or start a new run."
    )
    assert tickets(runs_dir) == []
    # What is missing or damaged can be made again.
    (run.path / "summary.json").write_text("[")
    jobs.resume(run)
    assert len(tickets(runs_dir)) == 1


def test_a_name_that_a_waiting_process_has_is_taken(tmp_path: Path, sleeper: Sleeper) -> None:
    queue(tmp_path, "taken", sleeper())
    assert mistake(jobs.reserve, tmp_path, "tiny", "taken") == TAKEN


def test_a_run_that_is_asked_twice_at_once_to_go_on_does_so_once(stand_in: Callable[[str], Path]) -> None:
    runs_dir = stand_in("time.sleep(60)")
    said, barrier = list[str](), Barrier(4)
    run = make_run(runs_dir, "mine", {"state": "stopped"})

    def ask() -> None:
        barrier.wait()
        try:
            jobs.resume(run)
        except UserError as error:
            said.append(str(error))

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == snapshot(
        ["Run mine is under way already.", "Run mine is under way already.", "Run mine is under way already."]
    )
    assert len(tickets(runs_dir)) == 1


# Stopping


COUNTS = """
folder = Path(sys.argv[3]).parent
def heard(*_):
    with (folder / "heard").open("a") as file: file.write("x")
    {then}
signal.signal(signal.SIGTERM, heard)
(folder / "ready").touch()
until = time.monotonic() + 60
while time.monotonic() < until: {each}
"""


def started(runs_dir: Path) -> RunFolder:
    """A run whose process listens to signals by now."""
    folder = jobs.reserve(runs_dir, "tiny", "mine")
    jobs.start(folder, "tiny", load_preset("tiny"))
    wait_until((folder.path / "ready").exists, "the process does not start")
    return folder


def heard(folder: RunFolder) -> int:
    """How many signals the process got."""
    return len((folder.path / "heard").read_text()) if (folder.path / "heard").exists() else 0


def test_a_process_that_sees_the_stop_file_gets_no_signal(
    stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 5.0)
    folder = started(
        stand_in(COUNTS.format(then="", each='(folder / "stop").exists() and sys.exit(); time.sleep(0.02)'))
    )
    assert jobs.stop(folder) is None
    wait_until(lambda: not tickets(folder.path.parent), "it goes on")
    time.sleep(0.5)  # the one that insists looks every 0.2 seconds
    assert heard(folder) == 0
    assert jobs.state_of(folder).state == "interrupted"
    assert plain(mistake(jobs.stop, folder)) == snapshot("Run mine is not under way.")


def test_a_process_that_ignores_the_file_is_asked_by_a_signal(
    stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.3)
    folder = started(stand_in(COUNTS.format(then="sys.exit(130)", each="time.sleep(0.02)")))
    jobs.stop(folder)
    assert folder.stop_asked
    wait_until(lambda: not tickets(folder.path.parent), "it goes on")
    assert heard(folder) == 1


def test_a_process_that_ignores_one_signal_gets_a_second_and_no_third(
    stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.3)
    folder = started(stand_in(COUNTS.format(then="", each="time.sleep(0.02)")))
    asked = time.monotonic()
    jobs.stop(folder)
    wait_until(lambda: heard(folder) == 2, "no second signal")
    assert time.monotonic() - asked > 2 * jobs.GRACE_SECONDS
    time.sleep(1)
    assert heard(folder) == 2
    assert jobs.state_of(folder).is_live


def test_another_run_in_the_same_queue_hears_nothing(
    stand_in: Callable[[str], Path], sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.2)
    other = sleeper()
    folder = started(stand_in(COUNTS.format(then="sys.exit()", each="time.sleep(0.02)")))
    queue(folder.path.parent, "other", other)
    jobs.stop(folder)
    wait_until(lambda: len(tickets(folder.path.parent)) == 1, "it goes on")
    assert other.poll() is None
    assert not (folder.path.parent / "other").exists()


def test_only_what_is_under_way_can_be_stopped(tmp_path: Path, sleeper: Sleeper) -> None:
    run = make_run(tmp_path, "mine", {"state": "done"})
    assert plain(mistake(jobs.stop, run)) == snapshot("Run mine is not under way.")
    assert not run.stop_asked
    # A run without a number, of an earlier version.
    write_status(run, pid=sleeper().pid, heartbeat=time.time())
    jobs.stop(run)
    assert run.stop_asked


# Deleting and renaming


def test_what_is_under_way_is_neither_deleted_nor_renamed(tmp_path: Path, sleeper: Sleeper) -> None:
    first, second = (make_run(tmp_path, name, {"state": "waiting"}) for name in ("first", "second"))
    third = jobs.reserve(tmp_path, "tiny", "third")
    for folder in (first, second, third):
        queue(tmp_path, folder.path.name, sleeper())
        name = folder.path.name
        assert plain(mistake(jobs.delete, folder), name=name) == snapshot(
            "Run <name> is under way: stop it before it is deleted."
        )
        assert plain(mistake(jobs.rename, folder, "other"), name=name) == snapshot(
            "Run <name> is under way: stop it before it is renamed."
        )
        assert folder.path.is_dir()
    assert not (tmp_path / "other").exists()


def test_what_rests_is_deleted_with_all_that_it_holds(tmp_path: Path) -> None:
    run, kept = make_run(tmp_path, "mine", {"state": "done"}), make_run(tmp_path, "kept")
    run.checkpoint.mkdir()
    (run.checkpoint / "state.safetensors").write_bytes(b"weights")
    jobs.delete(run)
    jobs.delete(jobs.reserve(tmp_path, "tiny", "never-began"))
    assert jobs.names(tmp_path) == ["kept"]
    assert kept.path.is_dir()


def test_a_renamed_run_is_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine", {"state": "stopped", "step": 3}, age=500)
    make_run(tmp_path, "newer", age=100)
    config = (run.path / "config.json").read_bytes()
    renamed = jobs.rename(run, "better")
    assert renamed.path == tmp_path / "better"
    assert not run.path.exists()
    assert (renamed.path / "config.json").read_bytes() == config
    assert jobs.state_of(renamed).step == 3
    assert jobs.names(tmp_path) == ["newer", "better"]


def test_own_text_is_found_where_the_run_is_called_otherwise(tmp_path: Path) -> None:
    settings = load_preset("tiny").model_dump()
    before = settings["topics"]["locks"]["corpus"]["source"]
    settings["topics"]["compounds"]["corpus"]["source"] = str(tmp_path.resolve() / "mine/texts/forget")
    settings["retain"]["corpora"][0]["source"] = str(tmp_path.resolve() / "mine/texts/retain")
    settings["title"] = str(tmp_path.resolve() / "mine-too")
    run = make_run(tmp_path, "mine", {"state": "stopped"}, age=500, settings=settings)
    (run.path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    make_run(tmp_path, "newer", age=100)
    renamed = jobs.rename(run, "better")
    for found in (renamed.config["settings"], yaml.safe_load((renamed.path / "tiny.yaml").read_text())):
        assert found["topics"]["compounds"]["corpus"]["source"] == str(
            tmp_path.resolve() / "better/texts/forget"
        )
        assert found["retain"]["corpora"][0]["source"] == str(tmp_path.resolve() / "better/texts/retain")
        assert found["topics"]["locks"]["corpus"]["source"] == before
        assert found["title"] == settings["title"]
    assert jobs.names(tmp_path) == ["newer", "better"], "it is as old as before"


def test_states_are_all_in_words() -> None:
    for state in jobs.STATES:
        assert jobs.RunState("mine", state).words
    live = {state for state in jobs.STATES if jobs.RunState("mine", state).is_live}
    assert live == {"waiting", "starting", "running"}
