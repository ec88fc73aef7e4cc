"""The status of a job: written at its beginning, at most once a second while it advances, and at its end."""

import os
import time
from pathlib import Path

import pytest

from lowmem_rmu.errors import ChangeSettings, Fix, ResumeRun, UserError, recorded_error
from lowmem_rmu.runs import status as module
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.status import Silent, StatusWriter, Stopped


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "mine")


def test_progress_is_written_and_shown(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    watcher = Silent()
    monkeypatch.setattr(watcher, "advanced", lambda done, figures: shown.append(done))
    with StatusWriter(run.job_status("audit"), watcher) as writer:
        assert run.read_job_status("audit").state == "running"
        writer.started("relearning", 9)
        writer.advanced(1, {})
        assert run.read_job_status("audit").step == 0, "less than a second has passed"
        monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.0)
        writer.advanced(2, {})
        found = run.read_job_status("audit")
        assert (found.stage, found.step, found.total, found.pid) == ("relearning", 2, 9, os.getpid())
        assert found.stage_began <= found.heartbeat <= time.time()
    assert run.read_job_status("audit").state == "done"
    assert shown == [1, 2]


@pytest.mark.parametrize(
    ("error", "state"),
    [(Stopped(Path("x")), "stopped"), (KeyboardInterrupt(), "stopped"), (ValueError("so"), "failed")],
)
def test_how_a_job_ended_is_written(run: RunFolder, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), StatusWriter(run.job_status("audit"), Silent()):
        raise error
    found = run.read_job_status("audit")
    assert found.state == state
    assert found.error == ("so" if state == "failed" else None)


@pytest.mark.parametrize(
    "fix",
    [
        None,
        "Give another.",
        Fix("Go on: {action}", ResumeRun("mine")),
        Fix("Choose:{action}", ChangeSettings((({"rmu.batch_size": 2}, "1 GiB"),))),
    ],
)
def test_the_error_of_a_user_comes_back_in_its_parts(run: RunFolder, fix: str | Fix | None) -> None:
    error = UserError("It is wrong.", fix)
    with pytest.raises(UserError), StatusWriter(run.job_status("audit"), Silent()):
        raise error
    found = recorded_error(vars(run.read_job_status("audit")))
    assert (found.problem, found.fix, str(found)) == (error.problem, error.fix, str(error))


def test_other_errors_have_no_parts(run: RunFolder) -> None:
    run.write_status("unlearn", 1, 2, "failed", ValueError("so"))
    assert recorded_error(vars(run.read_status())) is None


def test_a_deleted_run_does_not_come_back(run: RunFolder) -> None:
    writer = StatusWriter(run.path / "status.json", Silent())
    run.remove()
    with pytest.raises(FileNotFoundError):
        writer.started("unlearn", 1)
    assert not run.path.exists()


def test_without_a_file_only_the_watcher_is_informed() -> None:
    with StatusWriter(None, Silent()) as writer:
        writer.started("relearning", 9)
        writer.advanced(1, {})
        assert not writer.asks_to_stop()


def test_a_stop_file_asks_to_stop(run: RunFolder) -> None:
    writer = StatusWriter(run.path / "status.json", Silent(), run.path / "stop")
    assert not writer.asks_to_stop()
    (run.path / "stop").touch()
    assert writer.asks_to_stop()
