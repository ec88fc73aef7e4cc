"""The run folder: what is written where, atomically. The command line, the app and other people's scripts read it."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from lowmem_rmu.errors import UserError, nearest

STAGES = ("evaluate-base", "unlearn", "evaluate-unlearned", "report")
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@contextmanager
def replaced(path: Path, durable: bool = False) -> Iterator[Path]:
    """Gives a path beside to write; it takes the file's place once it is complete: a reader sees the old file or the new, never half.

    With `durable`, a power cut cannot tear it either: the content is on the disk before the name is.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        if durable:
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def add_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows in one write; a kill may tear the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may be missing, or be torn where a process was killed while it wrote."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class Watcher(Protocol):
    """Who follows a run, or other work on it: told when a stage starts and how far it is."""

    def started(self, stage: str, total: int) -> None: ...

    def advanced(self, done: int, figures: dict[str, float | str]) -> None: ...

    def asks_to_stop(self) -> bool: ...


class Stopped(Exception):
    """A run was asked to stop and has done so; `--resume` goes on in its `folder`, or what `go_on` says in words."""

    def __init__(self, folder: Path, go_on: str | None = None) -> None:
        super().__init__(f"{folder} was stopped")
        self.folder, self.go_on = folder, go_on


@contextmanager
def folder_replaced(folder: Path) -> Iterator[Path]:
    """Gives a new empty folder to fill; it takes the place of `folder` only once it is complete."""
    beside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _is_name(text: str) -> bool:
    """Whether a run may be called so."""
    return bool(_NAME.fullmatch(text)) and not text.endswith(".") and text.partition(".")[0].upper() not in _WINDOWS_DEVICES


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`, as README's "The run folder" lists it."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, name: str) -> "RunFolder":
        """A new folder for a run. Raises UserError for a name that leaves `runs_dir`, that is taken, or cannot be written."""
        path = cls.free_path(runs_dir, name)
        try:
            (path / "evaluation").mkdir(parents=True, exist_ok=cls(path).is_reserved)
        except OSError as error:
            raise UserError(f"Run folder {path} cannot be written: {error.strerror}.\nChoose another place with --runs-dir.") from error
        return cls(path)

    @classmethod
    def reserve(cls, runs_dir: Path, name: str) -> "RunFolder":
        """A folder for the output of a run's process, which makes it a run once its turn comes. Raises UserError as `create` does."""
        folder = cls.create(runs_dir, name)
        try:
            folder.output.touch()
        except OSError:
            shutil.rmtree(folder.path)
            raise
        return folder

    @classmethod
    def free_path(cls, runs_dir: Path, name: str) -> Path:
        """Where a new run would go. Raises UserError for a name that leaves `runs_dir` or is taken."""
        path = cls.inside(runs_dir, name)
        if path.exists() and not cls(path).is_reserved:
            raise UserError(f"Run {path} exists already.\nChoose another --name, or go on with it: --resume --name {name}")
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
        """Every run below `runs_dir`, newest first."""
        return cls._holding(runs_dir, "config.json")

    @classmethod
    def all_reserved(cls, runs_dir: Path) -> list["RunFolder"]:
        """Folders of runs whose process has not begun, or never could; newest first."""
        return [folder for folder in cls._holding(runs_dir, "output.txt") if folder.is_reserved]

    @classmethod
    def _holding(cls, runs_dir: Path, file: str) -> list["RunFolder"]:
        """Those that hold the file, where it is newest first; a folder of a name that none may have (a copy, a link) is no run."""
        paths = sorted(runs_dir.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [cls(path.parent) for path in paths if _is_name(path.parent.name) and not path.parent.is_symlink()]

    @staticmethod
    def inside(runs_dir: Path, name: str) -> Path:
        """The path of a run, taken or free. Raises UserError for a name that leaves `runs_dir`."""
        if not _is_name(name):
            allowed = 'letters, digits, ".", "_" and "-" only, at most 100, and no name of a Windows device'
            raise UserError(f'"{name}" cannot be the name of a run: use {allowed}, so that it stays inside {runs_dir}.')
        if (runs_dir / name).is_symlink():
            raise UserError(f"{runs_dir / name} is a link to another place: a run stays inside {runs_dir}.")
        return runs_dir / name

    @staticmethod
    def new_name(preset: str) -> str:
        return f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @property
    def output(self) -> Path:
        """What the run's process printed, where the app started it."""
        return self.path / "output.txt"

    @property
    def is_reserved(self) -> bool:
        return self.output.exists() and not (self.path / "config.json").exists()

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

    @property
    def audit_name(self) -> str:
        """What an audit of the run is called among those that wait for their turn."""
        return f"audit of {self.path.name}"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def matrices(self) -> Path:
        """sha256 of the model's own matrices that the adapter changes, by their names in the checkpoint; older runs have none."""
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

    def evaluation(self, side: str) -> Path:
        """`side` is `base` or `unlearned`."""
        return self.path / "evaluation" / f"{side}.json"

    def answers(self, side: str) -> Path:
        return self.path / "evaluation" / f"answers_{side}.jsonl"

    def read_evaluation(self, side: str) -> dict[str, Any] | None:
        path = self.evaluation(side)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def has_results(self) -> bool:
        """Whether anything was measured or trained: such a folder is kept, whatever happens."""
        return bool(read_lines(self.answers("base"))) or self.evaluation("base").exists() or self.metrics.exists() or self.adapter.exists()

    def read_stages(self) -> list[dict[str, Any]]:
        """Time and peak memory of the stages run so far."""
        path = self.path / "stages.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def read_status(self) -> dict[str, Any]:
        """Empty where there is none, or a power cut tore it."""
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        return {}

    def write_status(self, stage: str, step: int, total: int, state: str, error: str | None = None, began: float | None = None) -> None:
        """`state` is `waiting`, `running`, `stopped`, `failed` or `done`; `began` is when the stage did (seconds since 1970)."""
        status = {"stage": stage, "step": step, "total": total, "state": state, "pid": os.getpid(), "heartbeat": time.time(), "error": error}
        status["stage_began"] = began
        write_json(self.path / "status.json", status)

    def add_metrics(self, row: dict[str, Any]) -> None:
        add_lines(self.metrics, [row])

    def truncate_metrics(self, steps: int) -> None:
        """Drops lines beyond `steps`, the last of which may be half written: a resumed run writes them again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(self.metrics, "".join(lines[:steps]))

    @property
    def stop_asked(self) -> bool:
        return (self.path / "stop").exists()
