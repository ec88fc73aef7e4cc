"""Where a checkpoint lies: a folder of this machine, or a snapshot in the Hub's cache. A model is located
once per process.

    name, revision -> locate -> Source -> fetch("config.json"), fetch("model.safetensors"), ...

The Hub answers one question per model: which commit the revision stands for, and which files it holds. Every
file is then taken by this commit, and without a further question where the cache has it. Where the Hub cannot
be reached, the snapshot that an earlier download has left is used.
"""

import json
import logging
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lowmem_rmu.config.paths import as_path, is_local
from lowmem_rmu.errors import UserError, hub_errors, is_unreachable, not_reachable

CONFIG_FILE = "config.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json*",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that belong to a model besides its weights, by name. The card of the base model is not the merged
one's.
"""
POINTER = b"version https://git-lfs.github.com/spec/"
"""What a Git LFS pointer begins with: a clone without `git lfs` leaves it in place of a large file."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COPY_AGAIN = "Download or copy it again."
HUB_PAGES = (
    "https://huggingface.co/",
    "http://huggingface.co/",
    "https://hf.co/",
    "huggingface.co/",
    "hf.co/",
    "hf://",
)


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint."""

    name: str
    """As the settings have it: a local path, or a Hub id."""
    folder: Path
    revision: str | None = None
    """Of a model of the Hub, as it was asked for, and the commit that it stands for."""
    commit: str | None = None
    listed: frozenset[str] | None = None
    """The names of its files on the Hub; None where the folder holds all that can be had."""

    @property
    def words(self) -> str:
        return f"model {self.name}" if self.commit else f"model folder {self.name}"

    def fetch(self, file: str) -> Path | None:
        """Return the file on this machine, after a download if need be; None where the checkpoint has no such
        file.
        """
        path = self.folder / file
        if path.is_file():
            return path
        if self.listed is None or file not in self.listed:
            return None
        with hub_errors("model", self.name):
            downloaded = Path(hf_hub_download(self.name, file, revision=self.commit))
        self.remember_commit()
        return downloaded

    def remember_commit(self) -> None:
        """Note in the Hub's cache what the revision stands for, as a download by its name does: for use
        without a network.
        """
        if self.revision and self.commit and self.revision != self.commit and self.folder.is_dir():
            reference = self.folder.parent.parent / "refs" / self.revision
            if not reference.is_file() or reference.read_text(encoding="utf-8") != self.commit:
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self.commit, encoding="utf-8")

    def fetch_small_files(self) -> Path:
        """Return downloads what belongs to the model besides its weights and is not here yet. Returns the
        folder.
        """
        for file in sorted(self.listed or ()):
            if any(fnmatch(file, pattern) for pattern in COMPANIONS):
                self.fetch(file)
        return self.folder

    def lacks(self, files: list[str]) -> UserError:
        """Return the error for files that the checkpoint should have."""
        if self.commit and self.listed is None:
            return not_reachable("model", self.name)
        return UserError(
            f"The checkpoint {self.name} lacks {', '.join(files)}, which its index names.",
            f"{COPY_AGAIN}",
        )

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`. Raises UserError where it is missing, damaged or not a configuration."""
        file = self.fetch(CONFIG_FILE)
        if file is None and self.commit and self.listed is None:
            raise not_reachable("model", self.name)
        if file is None:
            raise UserError(
                f"The {self.words} holds no {CONFIG_FILE}.",
                "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id.",
            )
        return read_json(file)


def locate(name: str, revision: str | None = None) -> Source:
    """Raise UserError where the name is neither a folder of this machine nor a model of the Hub."""
    if is_local(name):
        return Source(name, _local_folder(name))
    _check_hub_id(name)
    with hub_errors("model", name):
        return _on_hub(name, revision or constants.DEFAULT_REVISION, constants.HF_HUB_CACHE)


def _local_folder(name: str) -> Path:
    folder = as_path(name)
    if not folder.is_dir():
        what = "is a file and no folder" if folder.exists() else "does not exist"
        raise UserError(
            f"The model folder {name} {what}.",
            "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id.",
        )
    return folder


def _check_hub_id(name: str) -> None:
    """Raise UserError, with what to write instead, for a name that cannot be a Hub id."""
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    if name.lower().startswith("file:"):
        raise UserError(
            f'The model "{shown}" is a file address.',
            f"Write its path: {'/' + name[5:].lstrip('/')}",
        )
    if page := next((page for page in HUB_PAGES if name.lower().startswith(page)), None):
        owner_and_name = "/".join(name[len(page) :].split("/")[:2])
        raise UserError(
            f'The model "{shown}" is an address of the Hub.',
            f"Write its id: {owner_and_name}",
        )
    if "://" in name:
        raise UserError(
            f'The model "{shown}" is an address, which is not read.',
            "Give a Hub id (owner/name), or the path of a folder.",
        )
    if "\\" in name:
        raise UserError(
            f'The model "{shown}" is a path of Windows, or has \\ where this machine writes /.',
            "Give a folder of this machine: ./NAME or /NAME.",
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f'The model "{shown}" is neither a Hub id nor a folder of this machine.',
            "A Hub id has the form owner/name; a local path starts with ./ or /.",
        ) from error


@cache
def _on_hub(name: str, revision: str, cache_folder: str) -> Source:
    """Ask the Hub once; where it does not answer, take the snapshot in the cache. An error is not
    remembered.
    """
    repository = Path(cache_folder) / f"models--{name.replace('/', '--')}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RevisionNotFoundError:
        raise
    except Exception as error:
        commit = _cached_commit(repository, revision)
        is_no_answer = is_unreachable(error) or isinstance(error, OfflineModeIsEnabled | HfHubHTTPError)
        if commit is None or not is_no_answer:
            raise
        if not isinstance(error, OfflineModeIsEnabled):
            logging.getLogger(__name__).warning(
                f"The Hub cannot be asked for the model {name}: it is used as it was last downloaded "
                f"(commit {commit[:12]})."
            )
        return Source(name, repository / "snapshots" / commit, revision, commit)
    listed = frozenset(sibling.rfilename for sibling in info.siblings or [])
    source = Source(name, repository / "snapshots" / str(info.sha), revision, info.sha, listed)
    source.remember_commit()
    return source


def _cached_commit(repository: Path, revision: str) -> str | None:
    """Return the commit that a revision stood for at the last download; None where nothing of it was kept."""
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return commit if (repository / "snapshots" / commit).is_dir() else None


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a model of the Hub; None for a local folder."""
    return None if is_local(name) else locate(name, revision).commit


def read_json(file: Path, what: str = "The file") -> dict[str, Any]:
    """Read a JSON file of a checkpoint. Raise UserError where it is damaged, a Git LFS pointer, or holds no
    object.

    `what` is what the messages call it.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {file} cannot be read: {error.strerror}.") from error
    check_no_pointer(file)
    if raw.startswith(BYTE_ORDER_MARK):
        raise UserError(
            f"{what} {file} begins with a byte order mark, which JSON does not have.",
            "Save it again as UTF-8 without one.",
        )
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{what} {file} is damaged or cut short: {reason}.",
            f"{COPY_AGAIN}",
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{what} {file} is damaged or cut short: it holds no JSON object.",
            f"{COPY_AGAIN}",
        )
    return content


def check_no_pointer(file: Path) -> None:
    """Raise UserError for a Git LFS pointer."""
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{file} is a Git LFS pointer ({os.path.getsize(file)} bytes) and not the file itself.",
                "Fetch the files with `git lfs pull` in their folder, or download the model again.",
            )
