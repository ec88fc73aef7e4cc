"""A kill at any change that a run makes on the disk: going on from there ends as if nothing had happened.

A killed process leaves the disk as it was before the change that it did not make. So one run is enough: before each of
its changes, and in the middle of each write, the runs folder is copied. Every copy is then gone on with.
"""

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from lowmem_rmu.cli.run import main_job
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.evaluation.kept import BASE_ANSWERS
from lowmem_rmu.report import charts
from lowmem_rmu.runs.files import read_lines
from lowmem_rmu.runs.folder import STAGES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="folders are told by their descriptors in /proc"
)

TINY = Path(__file__).resolve().parent.parent / "lowmem_rmu/tiny"
CONTEXT = multiprocessing.get_context("forkserver")
VARYING = {
    "seconds",
    "questions_per_second",
    "known_before",
    "peak_memory_bytes",
    "date",
    "total_evaluation_time_seconds",
    "created",
    "heartbeat",
    "pid",
    "started",
    "stage_began",
}
"""What differs between two runs of the same settings."""


class Recorder:
    """Copies a folder before every change in it."""

    def __init__(self, watched: Path, copies: Path) -> None:
        self.watched, self.copies = watched.resolve(), copies
        self.changes: list[str] = []
        self.is_copying = False
        copies.mkdir()

    def record(self, change: str, path: Any, directory: int = -1) -> None:
        """`directory` is the descriptor that a relative path belongs to."""
        if self.is_copying or isinstance(path, int):
            return
        base = Path(os.readlink(f"/proc/self/fd/{directory}")) if directory >= 0 else Path.cwd()
        whole = base / os.fsdecode(path)
        if whole.is_relative_to(self.watched) and whole.name != "lock":
            self.is_copying = True
            shutil.copytree(self.watched, self.copies / f"{len(self.changes):04}")
            self.changes.append(f"{change} {whole.relative_to(self.watched)}")
            self.is_copying = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python: called before anything is opened, renamed or removed."""
        if event == "open":
            path, mode, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.record("open", path)
        elif event == "os.rename":
            self.record("rename", arguments[1], arguments[3])
        elif event in ("os.remove", "os.rmdir"):
            self.record(event, arguments[0], arguments[1])
        elif event == "os.mkdir" and not Path(arguments[0]).exists():
            self.record(event, arguments[0], arguments[2])
        elif event in ("os.link", "os.symlink", "os.truncate"):
            self.record(event, arguments[1] if event != "os.truncate" else arguments[0])

    def open(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        """As the built-in one; what is written goes to the disk in two halves, with a copy between them."""
        opened = original_open(file, mode, *more, **named)
        if not self.is_copying and any(letter in mode for letter in "wax+") and not isinstance(file, int):
            write = opened.write

            def in_halves(content: Any) -> int:
                write(content[: len(content) // 2])
                opened.flush()
                self.record("half of", file)
                write(content[len(content) // 2 :])
                return len(content)

            opened.write = in_halves
        return opened

    def serialize_file(self, tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        """As safetensors writes a file, which Python hears nothing of."""
        self.record("write", path)
        original_serialize_file(tensors, path, *more, **named)
        content = Path(path).read_bytes()
        self.is_copying = True
        Path(path).write_bytes(content[: len(content) // 2])
        self.is_copying = False
        self.record("half of", path)
        self.is_copying = True
        Path(path).write_bytes(content)
        self.is_copying = False


original_open = builtins.open
original_serialize_file = safetensors.torch.serialize_file


def make_recorded(watched: Path, copies: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Do some work in a process that ends after it, and copy what a kill would leave at each of its changes."""
    recorder = Recorder(watched, copies)
    builtins.open = io.open = recorder.open  # type: ignore[assignment]
    safetensors.torch.serialize_file = recorder.serialize_file
    sys.addaudithook(recorder.hear)
    work(*arguments)
    recorder.is_copying = True
    (copies / "changes.json").write_text(json.dumps(recorder.changes))


def repeat(copies: list[Path], work: Callable[..., None], *arguments: Any) -> None:
    """Go on from each copy. A copy that cannot be gone on with keeps the error."""
    for copy in copies:
        try:
            work(copy, *arguments)
        except BaseException as error:
            (copy / "error.txt").write_text(f"{type(error).__name__}: {error}")


def in_process(work: Callable[..., None], *arguments: Any) -> None:
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def go_through(runs_dir: Path, preset_file: str) -> None:
    """Start the run, or go on with it: whichever a user would, for a run is there once it has its config.json."""
    torch.set_num_threads(1)
    quiet_libraries()
    charts.as_svg = lambda *arguments, **named: ""  # type: ignore[assignment]  # drawing takes seconds and writes nothing
    resume = (runs_dir / "run/config.json").exists()
    with original_open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        main_job("small", load_preset(preset_file), runs_dir, "run", "cpu", list(STAGES), resume)


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset of five steps and six questions on the shipped model."""
    folder = tmp_path_factory.mktemp("preset")
    # So little text that batches come again, and are kept in the cache.
    sources = {
        "forget": ("forget/compounds", 1),
        "retain": ("retain", 1),
        "questions": ("questions/compounds", 6),
    }
    for file, (source, count) in sources.items():
        lines = (TINY / f"data/{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{file}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rmu = {
        "target_layer": 1,
        "adapter_layers": [1],
        "modules": ["down_proj"],
        "rank": 2,
        "steps": 5,
        "batch_size": 2,
    }
    content = {
        "title": "Small",
        "model": {"name": str(TINY / "model"), "quantisation": "none", "dtype": "float32"},
        "rmu": rmu | {"learning_rate": 1e-3, "checkpoint_every": 2, "cache_in": "disk", "cache_gib": 0.1},
        "topics": {
            "compounds": {"corpus": {"source": str(folder / "forget.jsonl")}, "max_tokens": 16, "alpha": 10}
        },
        "retain": {"corpora": [{"source": str(folder / "retain.jsonl")}], "max_tokens": 16},
        "evaluation": {
            "batch_tokens": 128,
            "tasks": {"compounds": {"source": str(folder / "questions.jsonl"), "role": "forgotten"}},
            "prompts": [],
        },
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in VARYING}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def content_of(file: Path) -> Any:
    """What two runs of the same settings have in common in a file."""
    if file.suffix == ".json":
        return without_times(json.loads(file.read_text(encoding="utf-8")))
    if file.parent.name == BASE_ANSWERS:  # which holds the line that a kill has torn, too
        return read_lines(file)
    if file.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    if file.suffix == ".safetensors":  # the keys of its header come in any order
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), content[end:]
    return None if file.name == "report.html" else file.read_bytes()


def contents(folder: Path) -> dict[str, Any]:
    """All files below a folder, and all empty folders."""
    paths = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {
        path.relative_to(folder).as_posix(): content_of(path) if path.is_file() else None for path in paths
    }


def differences_of(copies: list[Path], whole: dict[str, Any], changes: list[str]) -> Iterator[str]:
    """How copies differ from the whole one after they were gone on with; nothing for those that are the same."""
    for copy in copies:
        change = changes[int(copy.name)]
        found = contents(copy)
        different = sorted(name for name in whole.keys() & found.keys() if whole[name] != found[name])
        error = found.pop("error.txt", b"").decode()
        missing, stray = sorted(whole.keys() - found.keys()), sorted(found.keys() - whole.keys())
        if error or different or missing or stray:
            yield f"{change}: {error} missing {missing}, stray {stray}, different {different}"


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_dies_at_any_change_goes_on_as_if_it_had_not(
    every: int, tmp_path: Path, preset_file: str
) -> None:
    CONTEXT.set_forkserver_preload(["lowmem_rmu.pipeline", "lowmem_rmu.report.html"])
    runs_dir, copied = tmp_path / "runs", tmp_path / "copies"
    runs_dir.mkdir()
    in_process(make_recorded, runs_dir, copied, go_through, runs_dir, preset_file)
    changes = json.loads((copied / "changes.json").read_text())
    copies = sorted(path for path in copied.iterdir() if path.is_dir())
    assert len(copies) == len(changes) > 120
    assert any(change.startswith("half of run/cache/") for change in changes)
    copies = copies[::every]
    in_process(repeat, copies, go_through, preset_file)
    assert list(differences_of(copies, contents(runs_dir), changes)) == []
