"""Files and folders written so that a killed process leaves the old or the new one, never half."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload

from lowmem_rmu.runs.records import as_json, intact_rows

T = TypeVar("T")


def number_in(content: Any, key: str) -> float | None:
    """Return a finite number from a JSON object; None where it has none under this key."""
    value = content.get(key) if isinstance(content, dict) else None
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


@contextmanager
def replaced(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write, which takes the file's place once it is complete: a reader sees the old file or
    the new one, never half.

    With `durable`, a power cut cannot tear it either: the content is on the disk before the name is.
    """
    unfinished = path.with_name(f".{path.name}.new")
    try:
        yield unfinished
        if durable:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_atomically(path, "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows))


def add_lines(path: Path, rows: Iterable[Any]) -> None:
    """Append rows in one write. A kill may tear the last line; the next row then begins on a new one."""
    text = "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


@overload
def read_lines(path: Path) -> list[dict[str, Any]]: ...
@overload
def read_lines(path: Path, kind: type[T]) -> list[T]: ...
def read_lines(path: Path, kind: Any = dict[str, Any]) -> list[Any]:
    """Return the rows of a file that may be missing, or be torn where a process was killed while it wrote:
    those that are records of this kind.
    """
    return intact_rows(path, kind)


def make_private(folder: Path, exist_ok: bool = False) -> None:
    """Make a folder that only its user can enter: it holds texts, answers and conversations. (Windows keeps
    its own permissions.)
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=exist_ok)


@contextmanager
def folder_replaced(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder to fill, which takes the place of `folder` only once it is complete."""
    unfinished, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that a killed process left directly in `folder`.

    These are the temporary names of `replaced` and `folder_replaced`. A folder that was moved away and not
    yet replaced comes back.
    """
    for path in folder.glob(".*.old"):
        whole = path.with_name(path.name[1 : -len(".old")])
        if not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.new"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
