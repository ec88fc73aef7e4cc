"""The folder of a run and its names."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from lowmem_rmu.errors import Fix, ResumeRun, UserError, nearest
from lowmem_rmu.runs.files import add_lines, make_private, read_lines, write_atomically, write_json
from lowmem_rmu.runs.processes import living_process
from lowmem_rmu.runs.records import (
    Answer,
    Recorded,
    Scores,
    StageCost,
    Status,
    StepRow,
    check_digest,
    checked_json,
    intact_record,
    read_record,
    read_rows,
)
from lowmem_rmu.runs.status import Stopped, write_status

STAGES = ("evaluate-base", "unlearn", "evaluate-unlearned", "report")
_WINDOWS_DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10)),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BEFORE_RESULTS = {"config.json", "status.json", "weights.json", "stages.json", "stop"}
"""Files that a run writes before its first result, and those in `evaluation/`."""
_BEFORE_ANSWERS = {"batch_tokens.json", "answers_base.jsonl"}


@contextmanager
def present(folder: Path) -> Iterator[None]:
    """Translate the failure of work on a run whose folder is deleted or moved meanwhile. Raises UserError."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        if (folder / "config.json").exists():
            raise
        raise UserError(
            f"The folder {folder} was deleted or moved while it was in use.",
            "The work on it has ended.",
        ) from error


def _is_name(text: str) -> bool:
    """Return whether a run may be called so."""
    return (
        bool(_NAME.fullmatch(text))
        and not text.endswith(".")
        and text.partition(".")[0].upper() not in _WINDOWS_DEVICES
    )


def _without_temporary(names: set[str]) -> set[str]:
    """Return names with those of `replaced` turned into the names that the files were to have."""
    return {re.sub(r"^\.(.*)\.new$", r"\1", name) for name in names}


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`, as README's "The run folder" lists it."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, name: str) -> "RunFolder":
        """Return a new folder for a run. Raises UserError for a name that leaves `runs_dir`, that is taken,
        or cannot be written.
        """
        path = cls.free_path(runs_dir, name)
        try:
            if path.exists() and not cls(path).is_reserved:
                shutil.rmtree(path)
            make_private(path, exist_ok=True)
            (path / "evaluation").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Run folder {path} cannot be written: {error.strerror}.",
                "Choose another place with --runs-dir.",
            ) from error
        return cls(path)

    @classmethod
    def reserve(cls, runs_dir: Path, name: str) -> "RunFolder":
        """Return a folder for the output of a run's process, which makes it a run once its turn comes. Raises
        UserError as `create` does.
        """
        folder = cls.create(runs_dir, name)
        try:
            folder.output.touch()
        except OSError:
            shutil.rmtree(folder.path)
            raise
        return folder

    @classmethod
    def free_path(cls, runs_dir: Path, name: str) -> Path:
        """Return where a new run would go. Raises UserError for a name that leaves `runs_dir` or is taken."""
        path, folder = cls.inside(runs_dir, name), cls(runs_dir / name)
        if path.exists() and not folder.is_reserved and not folder.is_leftover:
            raise UserError(
                f"Run {path} exists already.",
                Fix("Choose another --name, or go on with it: {action}", ResumeRun(name)),
            )
        return path

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> "RunFolder":
        path = cls.inside(runs_dir, name)
        if not (path / "config.json").is_file():
            known = [run.path.name for run in cls.all(runs_dir)]
            hint = nearest(name, known) if known else "It holds no runs yet."
            raise UserError(f"There is no run {name} in {runs_dir}. {hint}")
        return cls(path)

    @classmethod
    def all(cls, runs_dir: Path) -> list["RunFolder"]:
        """Return every run below `runs_dir`, newest first."""
        return cls._holding(runs_dir, "config.json")

    @classmethod
    def all_reserved(cls, runs_dir: Path) -> list["RunFolder"]:
        """Return folders of runs whose process has not begun, or never could; newest first."""
        return [folder for folder in cls._holding(runs_dir, "output.txt") if folder.is_reserved]

    @classmethod
    def _holding(cls, runs_dir: Path, file: str) -> list["RunFolder"]:
        """Return the folders that hold the file, newest first. Folders whose name no run may have (a copy, a
        link) are left out.
        """
        found = []
        for path in runs_dir.glob(f"*/{file}"):
            with suppress(OSError):  # deleted or renamed just now
                if _is_name(path.parent.name) and not path.parent.is_symlink():
                    found.append((path.stat().st_mtime, path.parent))
        return [cls(path) for _, path in sorted(found, key=lambda pair: pair[0], reverse=True)]

    @staticmethod
    def inside(runs_dir: Path, name: str) -> Path:
        """Return the path of a run, taken or free. Raises UserError for a name that leaves `runs_dir`."""
        if not _is_name(name):
            allowed = 'letters, digits, ".", "_" and "-" only, at most 100, and no name of a Windows device'
            raise UserError(
                f'"{name}" cannot be the name of a run: use {allowed}, so that it stays inside {runs_dir}.'
            )
        if (runs_dir / name).is_symlink():
            raise UserError(f"{runs_dir / name} is a link to another place: a run stays inside {runs_dir}.")
        return runs_dir / name

    @staticmethod
    def new_name(preset: str) -> str:
        return f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"

    @property
    def config(self) -> dict[str, Any]:
        return Recorded(self.path / "config.json")

    @property
    def output(self) -> Path:
        """What the run's process printed, where the app started it."""
        return self.path / "output.txt"

    @property
    def is_reserved(self) -> bool:
        return self.output.exists() and not (self.path / "config.json").exists()

    @property
    def is_leftover(self) -> bool:
        """Whether the folder is empty or holds only what a killed start left: its name is free."""
        if not self.path.is_dir() or (self.path / "config.json").exists() or self.has_results:
            return False
        evaluation = self.path / "evaluation"
        names = {path.name for path in self.path.iterdir() if path != evaluation}
        inner = {path.name for path in evaluation.iterdir()} if evaluation.is_dir() else set[str]()
        return _without_temporary(names) <= _BEFORE_RESULTS and _without_temporary(inner) <= _BEFORE_ANSWERS

    def remove(self) -> None:
        """Delete the folder. What makes it a run goes last, so that a killed deletion can be repeated."""
        last = self.output if self.is_reserved else self.path / "config.json"
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != last:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path)

    @property
    def exports(self) -> Path:
        """What the app exported, a folder a format, and what the process printed that did it."""
        return self.path / "exports"

    @property
    def export_name(self) -> str:
        """What an export of the run is called among those that wait for their turn."""
        return f"export of {self.path.name}"

    @property
    def audit(self) -> Path:
        """What the audit's attacks have computed so far, piece by piece."""
        return self.path / "audit"

    @property
    def audit_result(self) -> Path:
        return self.path / "audit.json"

    @property
    def audit_output(self) -> Path:
        """What the audit's process printed, where the app started it."""
        return self.path / "audit.txt"

    def job_status(self, job: str) -> Path:
        """Return the file with the status of another job on the run.

        `job` is `audit`, or `export-` with the name of the export's folder.
        """
        return self.path / "jobs" / f"{job}.json"

    def read_job_status(self, job: str) -> Status | None:
        """Return the status of another job on the run; None where there is none, or it is damaged."""
        return intact_record(self.job_status(job), Status)

    @property
    def audit_name(self) -> str:
        """What an audit of the run is called among those that wait for their turn."""
        return f"audit of {self.path.name}"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def matrices(self) -> Path:
        """sha256 of the model's own matrices that the adapter changes, by their names in the checkpoint;
        older runs have none.
        """
        return self.path / "matrices.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def cache(self) -> Path:
        """The hidden-state cache, where it is kept on disk; gone once the run has its adapter."""
        return self.path / "cache"

    @property
    def notes(self) -> Path:
        """What was noticed during the run: sentences, by the part of the work that they are about."""
        return self.path / "notes.json"

    def evaluation(self, side: str) -> Path:
        """`side` is `base` or `unlearned`."""
        return self.path / "evaluation" / f"{side}.json"

    def answers(self, side: str) -> Path:
        return self.path / "evaluation" / f"answers_{side}.jsonl"

    def read_evaluation(self, side: str) -> dict[str, Any] | None:
        """Return the scores of a side; None where it was not measured. Raises UserError where they are
        damaged.
        """
        path = self.evaluation(side)
        if not path.exists():
            return None
        scores = checked_json(
            path, Scores, Fix("Delete it, and have it written again from the answers: {action}", self._resume)
        )
        return dict(scores)

    def read_answers(self, side: str) -> list[Answer]:
        """Return the answers of a side that was measured, all of them. Raises UserError where the file is not
        what was scored.
        """
        path, scored = self.answers(side), self.read_evaluation(side)
        advice = f"Delete it and {self.evaluation(side)}, and have the questions asked again: {{action}}"
        again = Fix(advice, self._resume)
        answers = read_rows(path, Answer, again)
        if scored is None:
            return answers
        wanted = sum(task["questions"] for task in scored["tasks"].values())
        if len(answers) != wanted:
            raise UserError(
                f"{path} is damaged: it holds {len(answers)} answers, but {wanted} were scored.",
                again,
            )
        check_digest(path, scored.get("answers_sha256"), again)
        return answers

    @property
    def _resume(self) -> ResumeRun:
        return ResumeRun(self.path.name)

    @property
    def has_results(self) -> bool:
        """Whether anything was measured or trained: such a folder is kept, whatever happens."""
        return (
            bool(read_lines(self.answers("base")))
            or self.evaluation("base").exists()
            or self.metrics.exists()
            or self.adapter.exists()
        )

    def read_stages(self) -> list[StageCost]:
        """Time and peak memory of the stages run so far."""
        path = self.path / "stages.json"
        return (
            read_record(path, list[StageCost], "Delete it: only the times of earlier stages are lost.")
            if path.exists()
            else []
        )

    def read_notes(self) -> dict[str, list[str]]:
        """Return the notes so far; older runs have none. Raises UserError where they are damaged."""
        what_next = "Delete it: only remarks on how the run went are lost."
        return read_record(self.notes, dict[str, list[str]], what_next) if self.notes.exists() else {}

    def note(self, part: str, sentences: list[str]) -> None:
        """Put sentences in place of what was noticed before about a part of the work."""
        write_json(self.notes, self.read_notes() | {part: sentences})

    def read_metrics(self) -> list[StepRow]:
        """Return the rows of all steps so far. Raises UserError where one is damaged."""
        what_next = "Take the line out: only its point in the charts is lost."
        return read_rows(self.metrics, StepRow, what_next) if self.metrics.exists() else []

    def read_status(self) -> Status | None:
        """Return the run's status; None where there is none, or it is damaged."""
        return intact_record(self.path / "status.json", Status)

    @property
    def writer(self) -> psutil.Process | None:
        """The living process that is going through the run, by `status.json`."""
        status = self.read_status()
        if status is None or status.state != "running" or not status.pid:
            return None
        return living_process(status.pid, status.started, status.heartbeat)

    def write_status(
        self,
        stage: str,
        step: int,
        total: int,
        state: str,
        error: BaseException | str | None = None,
        began: float | None = None,
    ) -> None:
        """Write the run's status, as the function `write_status` does."""
        write_status(self.path / "status.json", stage, step, total, state, error, began)

    def add_metrics(self, row: dict[str, Any]) -> None:
        add_lines(self.metrics, [row])

    def truncate_metrics(self, steps: int) -> None:
        """Drop lines beyond `steps`, the last of which may be half written: a resumed run writes them
        again.
        """
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(self.metrics, "".join(lines[:steps]))

    @property
    def stop_asked(self) -> bool:
        return (self.path / "stop").exists()
