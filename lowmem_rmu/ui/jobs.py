"""Runs as processes of their own: started, stopped and found again by what lies in the runs folder."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
import yaml

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.summary import read_summary
from lowmem_rmu.memory.estimate import peak_of, plan
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.parsing import ParseError, parse_yaml
from lowmem_rmu.runs.files import read_lines, write_atomically, write_json
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.runs.queue import Ticket, free_name, one_at_a_time, process_of, take_ticket, tickets
from lowmem_rmu.runs.recorded import read_preset
from lowmem_rmu.runs.records import Status, StepTime
from lowmem_rmu.runs.status import write_status

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE_SECONDS = 20.0
"""After a stop was asked for, until the process gets a signal; and between two signals."""
NICENESS = 5
"""A run leaves the desktop, and the page, the processor first."""
STATES = {
    "waiting": "waiting for its turn",
    "starting": "starting",
    "running": "running",
    "stopped": "stopped; it can go on",
    "interrupted": "interrupted; it can go on",
    "failed": "failed",
    "done": "done",
}


@dataclass(frozen=True)
class RunState:
    """Where a run is, told by its folder and by whether its process lives."""

    name: str
    state: str
    """One of STATES."""
    stage: str = ""
    step: int = 0
    total: int = 0
    place: int = 0
    """In the queue: 0 has the device."""
    seconds_left: float | None = None
    """Of the stage."""
    error: str | None = None

    @property
    def is_live(self) -> bool:
        return self.state in ("waiting", "starting", "running")

    @property
    def words(self) -> str:
        """For people."""
        if self.state == "waiting":
            return f"waiting: {self.place} run{'s' if self.place > 1 else ''} before it"
        return STATES[self.state]


def reserve(runs_dir: Path, preset_name: str, name: str | None) -> RunFolder:
    """Return an empty folder for a new run; without a name its own one. Raises UserError for a name that is
    taken or none.
    """
    with one_at_a_time(runs_dir):
        if name is not None:
            return RunFolder.reserve(runs_dir, _free(runs_dir, name).name)
        return RunFolder.reserve(runs_dir, free_name(runs_dir, RunFolder.new_name(preset_name)))


def _free(runs_dir: Path, name: str) -> Path:
    """Return where a run of this name would go. Raises UserError for a name that is taken or invalid."""
    path = RunFolder.inside(runs_dir, name)
    if (path.exists() and not RunFolder(path).is_leftover) or process_of(runs_dir, name):
        raise UserError(
            f"Run {name} exists already.",
            "Choose another name.",
        )
    return path


def start(folder: RunFolder, preset_name: str, preset: Preset, device: str = "auto") -> None:
    """Start the process of a reserved run. Its settings lie next to it as a preset, so that a command line
    can repeat it.
    """
    _write_settings(folder, preset_name, preset.model_dump())
    with one_at_a_time(folder.path.parent):
        _launch(folder, preset_name, device, resume=False)


def preset_of(folder: RunFolder) -> Preset:
    """Return the settings of a run, or of one whose turn has not come. Raises UserError where it holds
    none.
    """
    if not folder.is_reserved:
        return read_preset(folder, pinned=False)
    return load_preset(str(_preset_file(folder)))


def _preset_file(folder: RunFolder) -> Path:
    preset_file = next(iter(folder.path.glob("*.yaml")), None)
    if preset_file is None:
        raise UserError(
            f"Run {folder.path.name} holds no settings to go on with.",
            "Delete it, and start a new one.",
        )
    return preset_file


def needed_by(ticket: Ticket, device: torch.device) -> int | None:
    """Return bytes that the run takes at its peak; None where its settings are not known yet."""
    folder = RunFolder(ticket.path.parent.parent / ticket.name)
    try:
        preset = preset_of(folder)
        return peak_of(plan(preset, ModelSpec.of_preset(preset), device))
    # An export, an audit, a run begun from the command line just now, or a damaged one.
    except (
        UserError,
        OSError,
        ValueError,
        KeyError,
    ):
        return None


def resume(folder: RunFolder) -> None:
    """Go on with a run that was stopped or interrupted.

    Raises UserError where it is under way or finished, has nothing to go on with, or has settings that this
    version does not know.
    """
    with one_at_a_time(folder.path.parent):  # requested twice at once, it is resumed once
        if state_of(folder).is_live:
            raise UserError(f"Run {folder.path.name} is under way already.")
        if is_finished(folder):
            raise UserError(
                f"Run {folder.path.name} is finished: nothing of it is left to do.",
                "See its results, or start a new run.",
            )
        if folder.is_reserved:
            _launch(folder, _preset_file(folder).stem, "auto", resume=False)
        else:
            preset_name, device = folder.config["preset"], folder.config["device"]
            _write_settings(folder, preset_name, read_preset(folder, pinned=False).model_dump())
            _launch(folder, preset_name, device, resume=True)


def is_finished(folder: RunFolder) -> bool:
    """Return whether every stage is done, and the summary and the report can be read."""
    status = folder.read_status()
    if status is None or status.state != "done" or not (folder.path / "report.html").exists():
        return False
    with suppress(UserError):
        read_summary(folder)
        results = [folder.evaluation("base"), folder.adapter, folder.evaluation("unlearned")]
        return all(path.exists() for path in results)
    return False


def _write_settings(folder: RunFolder, preset_name: str, settings: dict[str, Any]) -> None:
    write_atomically(
        folder.path / f"{preset_name}.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    )


def _launch(folder: RunFolder, preset_name: str, device: str, resume: bool) -> None:
    """Take a number for the process too, so that runs go in the order they were asked for. To be called
    within `one_at_a_time`.
    """
    runs_dir = folder.path.parent.resolve()
    command = [
        sys.executable,
        "-m",
        "lowmem_rmu.run",
        str(folder.path.resolve() / f"{preset_name}.yaml"),
        "--name",
        folder.path.name,
    ]
    command += ["--runs-dir", str(runs_dir), "--device", device, *(["--resume"] if resume else [])]
    (folder.path / "stop").unlink(missing_ok=True)
    folder.write_status("queue", 0, 0, "waiting")
    spawn(runs_dir, folder.path.name, command, folder.output)


def spawn(runs_dir: Path, name: str, command: list[str], output: Path) -> None:
    """Start a process that outlives this one, with its number under `name`; its output is appended to
    `output`. Within `one_at_a_time`.
    """
    # The page reads the output as UTF-8, whatever the system's own encoding is.
    in_utf8 = os.environ | {"PYTHONIOENCODING": "utf-8"}
    with output.open("ab") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=in_utf8,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
        take_ticket(runs_dir, name, process.pid)
    if os.name == "posix":
        psutil.Process(process.pid).nice(NICENESS)
    Thread(
        target=process.wait, daemon=True
    ).start()  # else it would stay a zombie for as long as the app lives


def begin(folder: RunFolder, job: str) -> None:
    """Note that an audit or an export is about to begin, so that a process that dies at once is noticed."""
    status = folder.job_status(job)
    status.parent.mkdir(exist_ok=True)
    write_status(status, "queue", 0, 0, "waiting")


def doing(folder: RunFolder, name: str, status: Status | None) -> str:
    """Return what an audit or an export does at the moment: `name` is what it is called in the queue."""
    waiting = [ticket.name for ticket in tickets(folder.path.parent)]
    before = waiting[: waiting.index(name)] if name in waiting else []
    if before:
        return f"waiting for {', '.join(before)}"
    if status is None or status.state != "running" or status.stage == "prepare":
        return "starting"
    if status.total:
        return f"{status.stage}, {status.step:,} of {status.total:,}"
    return f"{status.stage}, step {status.step:,}" if status.step else status.stage


def stop(folder: RunFolder) -> None:
    """Ask a run to stop after its step; a process that does not gets signals. Raises UserError where it
    is not under way.
    """
    ticket = _ticket(folder, folder.path.name)
    if ticket is None and not state_of(folder).is_live:
        raise UserError(f"Run {folder.path.name} is not under way.")
    (folder.path / "stop").touch()
    if ticket:
        Thread(target=_insist, args=(ticket,), daemon=True).start()


def _insist(ticket: Ticket) -> None:
    """Send up to two signals: the first asks once more, the second ends the run at its last checkpoint."""
    for _ in range(2):
        if not _lives_on(ticket, GRACE_SECONDS):
            return
        if process := ticket.process:
            process.terminate()


def _lives_on(ticket: Ticket, seconds: float) -> bool:
    """Return whether the process still has its turn after so many seconds; told as soon as it has not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not ticket.path.exists() or ticket.process is None:
            return False
        time.sleep(0.2)
    return True


def delete(folder: RunFolder) -> None:
    """Raise UserError while it is under way."""
    with one_at_a_time(folder.path.parent):
        _check_rests(folder, "deleted")
        folder.remove()


def rename(folder: RunFolder, name: str) -> RunFolder:
    """Raise UserError while it is under way, and for a name that is taken or none."""
    with one_at_a_time(folder.path.parent):
        _check_rests(folder, "renamed")
        renamed = RunFolder(folder.path.rename(_free(folder.path.parent, name)))
        _follow_own_text(renamed, str(folder.path.resolve()))
    return renamed


def _follow_own_text(folder: RunFolder, before: str) -> None:
    """Own text lies in the run's folder, which was called `before`: the settings get its new place, and the
    run stays as old as it was.
    """
    now = str(folder.path.resolve())
    for path in folder.path.glob("*.yaml"):
        # A damaged one stays as it is: to resume with it is refused by name.
        with suppress(ParseError, UnicodeDecodeError):
            settings, _ = parse_yaml(path.read_text(encoding="utf-8"))
            _write_settings(folder, path.stem, _moved(settings, before, now))
    if not folder.is_reserved and (moved := _moved(folder.config, before, now)) != folder.config:
        path = folder.path / "config.json"
        as_of = path.stat()
        write_json(path, moved)
        os.utime(path, ns=(as_of.st_atime_ns, as_of.st_mtime_ns))


def _moved(content: Any, before: str, now: str) -> Any:
    """Return the same with every path below the folder `before` below `now`."""
    if isinstance(content, dict):
        return {key: _moved(value, before, now) for key, value in content.items()}
    if isinstance(content, list):
        return [_moved(each, before, now) for each in content]
    return (
        now + content[len(before) :]
        if isinstance(content, str) and content.startswith(before + os.sep)
        else content
    )


def _check_rests(folder: RunFolder, what: str) -> None:
    if state_of(folder).is_live:
        raise UserError(f"Run {folder.path.name} is under way: stop it before it is {what}.")
    if is_exported_now(folder):
        raise UserError(
            f"Run {folder.path.name} is being exported: wait until that is done before it is {what}."
        )
    if is_audited_now(folder):
        raise UserError(f"Run {folder.path.name} is being audited: stop that before it is {what}.")


def is_exported_now(folder: RunFolder) -> bool:
    """Return whether a process exports it, or waits for its turn to."""
    return process_of(folder.path.parent, folder.export_name) is not None


def is_audited_now(folder: RunFolder) -> bool:
    """Return whether a process audits it, or waits for its turn to."""
    return process_of(folder.path.parent, folder.audit_name) is not None


def stop_audit(folder: RunFolder) -> None:
    """Ask the audit of a run to stop after its step; asked again it stops at once. Raises UserError where
    none is under way.
    """
    process = process_of(folder.path.parent, folder.audit_name)
    if process is None:
        raise UserError(f"Run {folder.path.name} is not being audited.")
    with suppress(psutil.NoSuchProcess):
        process.terminate()


def find(runs_dir: Path, name: str | None) -> RunFolder:
    """Return a run or a reserved folder by its name. Raises UserError where there is none, or none was
    chosen.
    """
    if not name:
        raise UserError("Choose a run first.")
    for folder in RunFolder.all_reserved(runs_dir):
        if folder.path.name == name:
            return folder
    return RunFolder.open(runs_dir, name)


def names(runs_dir: Path) -> list[str]:
    """Return the names of all runs: those under way first and in their order, then the newest."""
    under_way = [ticket.name for ticket in tickets(runs_dir)]
    folders = sorted([*RunFolder.all_reserved(runs_dir), *RunFolder.all(runs_dir)], key=_began, reverse=True)
    others = [folder.path.name for folder in folders]
    return list(dict.fromkeys([name for name in under_way if name in others] + others))


def _began(folder: RunFolder) -> float:
    """When it was reserved, or became a run (seconds since 1970)."""
    with suppress(OSError):  # deleted just now
        return (folder.output if folder.is_reserved else folder.path / "config.json").stat().st_mtime
    return 0.0


def state_of(folder: RunFolder) -> RunState:
    """Return where a run is: by its place in the queue, its status, and whether its process lives."""
    name, queue = folder.path.name, tickets(folder.path.parent)
    status = folder.read_status()
    place = next((place for place, ticket in enumerate(queue) if ticket.name == name), None)
    if place:
        return RunState(name, "waiting", place=place)
    if status is None:
        missing = "failed" if folder.is_reserved else "interrupted"
        return RunState(name, missing if place is None else "starting")
    state = status.state
    if place is None and state in ("waiting", "running") and folder.writer is None:
        state = "interrupted"
    if place == 0 and state != "running":
        return RunState(name, "starting")
    left = _seconds_left(folder, status) if state == "running" else None
    return RunState(name, state, status.stage, status.step, status.total, 0, left, status.error)


def _seconds_left(folder: RunFolder, status: Status) -> float | None:
    """Estimate the seconds left in the stage, by the pace of its last steps or of the stage so far."""
    rest = status.total - status.step
    if status.stage == STAGES[1]:
        seconds = [row.seconds for row in read_lines(folder.metrics, StepTime)[-20:]]
        return rest * sum(seconds) / len(seconds) if seconds else None
    if not status.stage_began or not status.step:
        return None
    return rest * (status.heartbeat - status.stage_began) / status.step


def _ticket(folder: RunFolder, name: str) -> Ticket | None:
    return next((ticket for ticket in tickets(folder.path.parent) if ticket.name == name), None)
