"""The folder of an export: filled next to its place, which it takes once it is whole; linked and copied
files; room on the disk.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lowmem_rmu.errors import UserError, is_disk_full
from lowmem_rmu.runs.files import folder_replaced
from lowmem_rmu.weights.shards import cut_short

COPIED_AT_ONCE = 2**26  # bytes in one call to the system, which Ctrl-C does not interrupt
MOVED_AT_ONCE = (
    2**16
    # Bytes in one read or write: Linux looks for large free pages for larger writes, which took it four times
    # as long.
)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield an empty folder next to `to`, which becomes `to` once it is filled; nothing of it stays after an
    error.

    (Only a kill leaves it there, with a hidden name, until the next export to the same place.) Raises
    UserError where `to` is not free, cannot be written, or its disk becomes full.
    """
    to = to.expanduser().resolve()
    if to.is_file() or (to.exists() and any(to.iterdir())):
        raise UserError(
            f"{to} is not empty, and an export overwrites nothing.",
            "Give another folder with --to, or empty it first.",
        )
    try:
        with folder_replaced(to) as unfinished:
            yield unfinished
    except OSError as error:
        if _is_full(error):
            raise UserError(
                f"The disk that holds {to} is full. Nothing was left there.",
                "Make room, then give the same command again.",
            ) from error
        if error.filename and Path(os.fsdecode(error.filename)) in {
            *to.parents,
            to,
            to.with_name(f".{to.name}.new"),
        }:
            raise UserError(
                f"{to} cannot be written: {error.strerror}.",
                "Give another folder with --to.",
            ) from error
        raise


def _is_full(error: OSError) -> bool:
    """Also where only a file may not become so large."""
    return is_disk_full(error) or error.errno == errno.EFBIG


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError where the disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The export needs {needed / 1000000000.0:,.2f} GB, but {free / 1000000000.0:,.2f} GB are free "
            f"on the disk of {folder.parent}.",
            "Make room, or give a folder on another disk with --to.",
        )


def same_disk(file: Path, folder: Path) -> bool:
    """Return whether a link in the folder could stand for the file."""
    return file.stat().st_dev == folder.stat().st_dev


def link_or_copy(file: Path, to: Path, link: bool) -> bool:
    """Make `to` the same file (a hard link; then it says True) where that is wanted and possible, else
    another with the same bytes.
    """
    source = file.resolve()  # what the Hub's cache shows is a symbolic link
    if link:
        try:
            os.link(source, to)
            return True
        except OSError:  # another disk, or one that has no links
            pass
    with source.open("rb", buffering=0) as old, to.open("xb", buffering=0) as new:
        copy_bytes(old, new, 0, source.stat().st_size)
    return False


def copy_bytes(old: FileIO, new: FileIO, start: int, end: int) -> None:
    """Append the old file's bytes from `start` to `end`."""
    while start < end:
        copied = _copied_by_the_system(old, new, start, min(end - start, COPIED_AT_ONCE))
        start += copied or _copied_by_reading(old, new, start, min(end - start, MOVED_AT_ONCE))


def _copied_by_the_system(old: FileIO, new: FileIO, start: int, count: int) -> int:
    """Copy bytes with the system's own call and return how many; 0 where it cannot. (Disks that share blocks
    between files then do.)
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(old.fileno(), new.fileno(), count, start)
    except OSError as error:
        if _is_full(error):
            raise
        return 0


def _copied_by_reading(old: FileIO, new: FileIO, start: int, count: int) -> int:
    old.seek(start)
    content = old.read(count)
    if not content:
        raise cut_short(Path(os.fsdecode(old.name)))
    return write_whole(new, content)


def write_whole(new: FileIO, content: bytes | memoryview) -> int:
    """Write all of it, and say how many bytes that were."""
    left = memoryview(content)
    while left:
        left = left[new.write(left[:MOVED_AT_ONCE]) :]
    return len(content)
