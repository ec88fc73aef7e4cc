"""A folder is there whole or not at all, whatever happens while it is filled."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.export import folder as folder_module
from lowmem_rmu.export.folder import copy_bytes, link_or_copy, new_folder
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain

TINY = Path(__file__).parents[2] / "lowmem_rmu/tiny/model"
MakeRun = Callable[..., RunFolder]
posix = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has neither limits of file sizes nor SIGKILL"
)


def padded_model(folder: Path, padding: int) -> Path:
    """The tiny model with one more tensor, which nobody needs: a hole of so many bytes at the end of its file."""
    shutil.copytree(TINY, folder)
    content = (TINY / "model.safetensors").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8:data]), len(content) - data
    header["unheard.of"] = {"dtype": "U8", "shape": [padding], "data_offsets": [end, end + padding]}
    longer = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(longer).to_bytes(8, "little") + longer + content[data:])
        file.truncate(file.tell() + padding)
    return folder


@pytest.mark.parametrize("what", ["a folder with a file", "a file"])
def test_a_target_that_is_not_empty_is_left_alone(make_run: MakeRun, tmp_path: Path, what: str) -> None:
    run, to = make_run(TINY), tmp_path / "there"
    if what == "a file":
        to.write_text("mine")
    else:
        to.mkdir()
        (to / "note.txt").write_text("mine")
    with pytest.raises(UserError) as raised:
        merge(run, to)
    assert plain(raised.value, to=to) == snapshot(
        "<to> is not empty, and an export overwrites nothing.\n"
        "Give another folder with --to, or empty it first."
    )
    assert (to if to.is_file() else to / "note.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as raised, new_folder(tmp_path / "file/merged"):
        pass
    assert plain(raised.value, to=tmp_path / "file/merged") == snapshot(
        "<to> cannot be written: Not a directory.\nGive another folder with --to."
    )


def fail_midway(to: Path, error: BaseException) -> None:
    with new_folder(to) as folder:
        (folder / "half").write_text("half")
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), KeyboardInterrupt(), OSError(5, "Input/output error", "/elsewhere")],
    ids=repr,
)
def test_other_errors_pass_through_and_nothing_stays(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        fail_midway(tmp_path / "new", error)
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    """A file with a hole that is larger than the disk."""
    too_much = shutil.disk_usage(tmp_path).free + 2**30
    try:
        run = make_run(padded_model(tmp_path / "padded", too_much))
    except OSError as error:
        pytest.skip(f"the disk takes no file of that size: {error}")
    with pytest.raises(UserError) as raised:
        merge(run, tmp_path / "merged")
    figures = [words.split()[-1] for words in str(raised.value).split(" GB")[:2]]
    needed, free = (float(figure.replace(",", "")) for figure in figures)
    assert needed == pytest.approx(too_much / 1e9, rel=0.01)
    assert needed > free > 0
    assert plain(raised.value, needed=f"{figures[0]} GB", free=f"{figures[1]} GB", disk=tmp_path) == snapshot(
        "The export needs <needed>, but <free> are free on the disk of <disk>.\n"
        "Make room, or give a folder on another disk with --to."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"padded", "runs"}


def process_of(
    target: Callable[..., object], args: tuple[object, ...]
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")  # a plain fork would hang where torch has had threads
    context.set_forkserver_preload(["lowmem_rmu.export.merge.streamed"])
    return context.Process(target=target, args=args)


def export_in_limits(run: RunFolder, to: Path, size: int) -> None:
    """What a process does for which files end at so many bytes, as a full disk ends them."""
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        merge(run, to)
    except UserError as error:
        to.with_name("message").write_text(str(error))
        os._exit(3)


@posix
@pytest.mark.parametrize(
    "size", [1000, 50_000, 2_000_000], ids=["in the header", "in a small file", "among the matrices"]
)
def test_a_disk_that_becomes_full_leaves_nothing(make_run: MakeRun, tmp_path: Path, size: int) -> None:
    run = make_run(TINY)
    process = process_of(target=export_in_limits, args=(run, tmp_path / "merged", size))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "message"}
    assert plain((tmp_path / "message").read_text(), to=tmp_path / "merged") == snapshot(
        "The disk that holds <to> is full. Nothing was left there.\n"
        "Make room, then give the same command again."
    )


@posix
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_export_clears_it_away(
    make_run: MakeRun, tmp_path: Path
) -> None:
    model = padded_model(tmp_path / "model", 2 * 10**9)
    run, beside, to = make_run(model), tmp_path / ".merged.new", tmp_path / "merged"
    process = process_of(target=merge, args=(run, to))
    process.start()
    deadline = time.monotonic() + 180
    while (
        not (beside / "model.safetensors").exists() or (beside / "model.safetensors").stat().st_size < 10**7
    ):
        assert process.is_alive(), "the export came to its end before it was killed"
        assert time.monotonic() < deadline
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert beside.exists()
    assert not to.exists()
    shutil.rmtree(model)
    shutil.copytree(TINY, model)
    merge(run, to)
    assert not beside.exists()
    assert (to / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size


def test_a_file_that_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("content")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert not link_or_copy(tmp_path / "file", tmp_path / "copy", link=True)
    assert (tmp_path / "copy").read_text() == "content"
    assert not os.path.samefile(tmp_path / "file", tmp_path / "copy")


@pytest.mark.parametrize("by_the_system", [True, False])
def test_bytes_are_copied_from_place_to_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_the_system: bool
) -> None:
    if not by_the_system:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(folder_module, "MOVED_AT_ONCE", 300)
    monkeypatch.setattr(folder_module, "COPIED_AT_ONCE", 300)
    content = os.urandom(1000)
    (tmp_path / "old").write_bytes(content)
    with (tmp_path / "old").open("rb", buffering=0) as old, (tmp_path / "new").open("xb", buffering=0) as new:
        for span in ((700, 1000), (0, 0), (5, 650)):
            copy_bytes(old, new, *span)
    assert (tmp_path / "new").read_bytes() == content[700:] + content[5:650]


def test_a_file_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"12345")
    with (
        (tmp_path / "old").open("rb", buffering=0) as old,
        (tmp_path / "new").open("xb", buffering=0) as new,
        pytest.raises(UserError) as caught,
    ):
        copy_bytes(old, new, 0, 6)
    assert plain(caught.value, file=tmp_path / "old") == snapshot(
        "The checkpoint's file <file> is damaged or cut short.\nDownload or copy it again."
    )
