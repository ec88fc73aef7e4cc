"""Local files of a data set: which of them are read, which are left out and why, and what stands in one."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lowmem_rmu.errors import UserError, readable, shortened

NAMES_SHOWN = 5
"""Names of files that a sentence lists."""
NAMES_KEPT = 200
"""Names of files that a run's config.json lists for each source."""
ABOUT_THE_DATA = re.compile(
    r"(README|LICEN[CS]E)([._-].*)?"
    r"|(COPYING|NOTICE|CITATION|CHANGELOG|CONTRIBUTING|CODE_OF_CONDUCT|AUTHORS)(\..*)?"
    r"|(DATA_?SET_?CARD|DATA_?SHEET)(\..*)?",
    re.IGNORECASE,
)
"""Names of files that come with data and are no data."""
_WITH_PANDAS = (
    "Convert it to .jsonl, for example with pandas: "
    'read_{}(FILE).to_json("data.jsonl", orient="records", lines=True).'
)
_UNPACK = "Unpack it first."
_EXPORT = "Save its text as .txt, in UTF-8."
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".rar")
_FORMATTED = (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm")
OTHER_KINDS = {
    ".json": ("a JSON file", _WITH_PANDAS.format("json")),
    ".csv": ("a CSV table", _WITH_PANDAS.format("csv")),
    ".tsv": ("a table", "Convert it to .jsonl: one JSON object per line."),
    ".parquet": ("a Parquet file", _WITH_PANDAS.format("parquet")),
    ".arrow": ("an Arrow file", _WITH_PANDAS.format("feather")),
    ".feather": ("a Feather file", _WITH_PANDAS.format("feather")),
    ".xlsx": ("a spreadsheet", _WITH_PANDAS.format("excel")),
    **dict.fromkeys(_PACKED, ("a compressed file or an archive", _UNPACK)),
    **dict.fromkeys(_FORMATTED, ("a formatted document", _EXPORT)),
}
"""Kinds of files that people have instead, by suffix: what one is, and what to do with it."""
_SIGNATURES = {
    b"PAR1": OTHER_KINDS[".parquet"],
    b"\x1f\x8b": ("compressed by gzip", _UNPACK),
    b"PK\x03\x04": ("a ZIP archive or an office document", "Unpack it, or save its text as .txt, in UTF-8."),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"%PDF-": ("a PDF", _EXPORT),
}
"""First bytes of files whose suffix says something else."""
_LFS_POINTER = "version https://git-lfs.github.com/spec/"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What UTF-16 and binary files may hold although they decode; no tokenizer takes half of a surrogate pair."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a local corpus or task."""

    path: Path
    read: list[Path] = field(default_factory=list)
    """In their order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a file is not read, by its name within the folder."""

    @property
    def names(self) -> list[str]:
        """Of the files that are read, within the folder."""
        if not self.path.is_dir():
            return [readable(self.path.name)]
        return [readable(file.relative_to(self.path).as_posix()) for file in self.read]

    def sentence(self) -> str:
        """Return in words what is read and what is left out."""
        words = f"{len(self.read):,} file{'' if len(self.read) == 1 else 's'} ({_some(self.names)})"
        return f"{words}. Left out: {self.left_out_in_words()}" if self.left_out else words

    def left_out_in_words(self) -> str:
        """Return names and reasons."""
        return _some([f"{name} ({reason})" for name, reason in self.left_out.items()])

    def record(self) -> dict[str, Any]:
        """Return the same for `config.json`: names within the folder, and no path of the machine."""
        return {
            "files": len(self.read),
            "read": self.names[:NAMES_KEPT],
            "files_left_out": len(self.left_out),
            "left_out": dict(list(self.left_out.items())[:NAMES_KEPT]),
        }

    def leave_out(self, file: Path, reason: str) -> None:
        """Note why a file of the folder is not read."""
        name = readable(file.relative_to(self.path).as_posix())
        self.left_out[name + ("/" if file.is_dir() else "")] = reason


def find_files(path: Path, kinds: tuple[str, ...], recursive: bool = True) -> SourceFiles:
    """Sort out the files of a folder, and of its subfolders where `recursive`.

    A file that was named itself is taken whatever its name. `kinds` are the suffixes that are read, in lower
    case. Raises UserError where the path is neither a file nor a folder, or a file of another kind.
    """
    try:
        is_folder = path.is_dir()
        is_file = path.is_file()
    except OSError as error:  # a name that is too long
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if is_file:
        if path.suffix.lower() not in kinds:
            advice = what_to_do(path, kinds)
            raise UserError(
                f"{path} is {what_it_is(path)}, which is not read here.",
                f"{advice}",
            )
        return SourceFiles(path, [path])
    if not is_folder:
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}.",
            f"Give a {in_words(kinds)} file, or a folder of them.",
        )
    found = SourceFiles(path)
    for file in _walk(path, found, recursive):
        if reason := why_left_out(file.relative_to(path), kinds):
            found.leave_out(file, reason)
        elif not file.is_file():
            found.leave_out(file, "a link to what is not there" if file.is_symlink() else "no regular file")
        else:
            found.read.append(file)
    found.read.sort()
    return found


def _walk(folder: Path, found: SourceFiles, recursive: bool) -> Iterator[Path]:
    """Yield the files below a folder; folders that are not entered are noted as left out."""
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        for name in sorted(folders):
            path = Path(parent) / name
            if name.startswith(".") or path.is_symlink():
                found.leave_out(path, "hidden" if name.startswith(".") else "a link to a folder")
        if recursive:
            # os.walk does not enter links to folders.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
        else:
            folders.clear()
        for name in sorted(files):
            yield Path(parent) / name


def _unreadable(error: OSError) -> None:
    raise UserError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error


def why_left_out(name: PurePath, kinds: tuple[str, ...]) -> str | None:
    """Why a file of a folder is not read, by its name within it; None where it is."""
    if any(part.startswith(".") for part in name.parts):
        return "hidden"
    if ABOUT_THE_DATA.fullmatch(name.name):
        return "about the data"
    if name.suffix.lower() not in kinds:
        return what_it_is(name)
    return None


def what_it_is(name: PurePath) -> str:
    """Return what a file that is not read seems to be, by its name."""
    suffix = name.suffix.lower()
    if suffix in OTHER_KINDS:
        return OTHER_KINDS[suffix][0]
    return f"a {shortened(suffix)} file" if suffix else "a file without a suffix"


def what_to_do(name: PurePath, kinds: tuple[str, ...]) -> str:
    """Return how to make a file readable, by its name."""
    return OTHER_KINDS.get(name.suffix.lower(), ("", f"Give a {in_words(kinds)} file."))[1]


def nothing_to_read(found: SourceFiles, what: str, kinds: tuple[str, ...]) -> UserError:
    """Return the mistake of a folder in which nothing can be read: what it holds instead, and what to do."""
    lines = [f"The {what} folder {found.path} holds no {in_words(kinds)} file."]
    if found.left_out:
        lines.append(f"Not read: {found.left_out_in_words()}.")
        known = [Path(name) for name in found.left_out if Path(name).suffix.lower() in OTHER_KINDS]
        about = [name for name, reason in found.left_out.items() if reason == "about the data"]
        if known:
            lines.append(what_to_do(known[0], kinds))
        elif of_split := [reason for reason in found.left_out.values() if reason.startswith("of the split ")]:
            splits = sorted({reason.split()[-1] for reason in of_split})
            lines.append(f"Set the task's split to the one you mean: {', '.join(splits)}.")
        elif about:
            lines.append(f"To read {about[0]} all the same, name the file itself.")
    return UserError("\n".join(lines))


def read_utf8(path: Path) -> str:
    """Read a UTF-8 file, its line ends as they are. Raises UserError for what is no text, by what it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, content, f"byte {error.start}") from error
    if "\0" in text or text.startswith("%PDF-"):
        raise _not_text(path, content, "it holds NUL characters or half of a pair")
    if text.startswith(_LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself.",
            "Fetch the file: git lfs pull",
        )
    return text


def _not_text(path: Path, content: bytes, why: str) -> UserError:
    for signature, (kind, advice) in _SIGNATURES.items():
        if content.startswith(signature):
            return UserError(
                f"{path} is {kind}, whatever its name says.",
                f"{advice}",
            )
    return UserError(
        f"{path} is not UTF-8 text ({why}).",
        "Save it as UTF-8.",
    )


def is_text(value: str) -> bool:
    """Return whether a tokenizer takes it: NUL characters and halves of surrogate pairs are no text."""
    return not _NO_TEXT.search(value)


def in_words(kinds: tuple[str, ...]) -> str:
    return " or ".join(kinds) if len(kinds) == 2 else ", ".join(kinds)


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
