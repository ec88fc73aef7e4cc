"""The files of a checkpoint: only those that are needed are opened or downloaded, and one weight is read at a time."""

import ctypes
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import is_local

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names of its settings, in malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes
ABOVE_THE_LAYERS = re.compile(r"((?!embed)\w+\.)?(norm|final_norm|final_layernorm|final_layer_norm|lm_head|embed_out)\.(weight|bias)")


def is_needed(name: str, layers: int | None) -> bool:
    """Whether a model cut to its first `layers` layers has the weight: what is below them too, but no final norm and no head."""
    if layers is None:
        return True
    number = LAYER_NUMBER.search(name)
    return int(number[1]) < layers if number else not ABOVE_THE_LAYERS.fullmatch(name)


def needed_files(weight_map: dict[str, str], layers: int | None) -> list[str]:
    """The files that hold what is needed, by the index of a sharded checkpoint: `{weight: file}`."""
    return sorted({file for name, file in weight_map.items() if is_needed(name, layers)})


def find_files(name: str, revision: str, layers: int | None) -> list[Path]:
    """The safetensors files to read, downloaded where `name` is on the Hub. Raises UserError where one is missing."""
    with suppress(LocalEntryNotFoundError):  # offline: of a sharded checkpoint, only the index is here
        if single := fetch(name, SINGLE, revision):
            return [single]
    if (index := fetch(name, INDEX, revision)) is None:
        place = f"model folder {name}" if is_local(name) else f"model {name}"
        others = _pickled(name)
        only = f", only {', '.join(others)}" if others else ""
        raise UserError(f"The {place} holds no *.safetensors file{only}.\nOther formats are not read: pickled weights can run code.")
    files = {file: fetch(name, file, revision) for file in needed_files(_weight_map(index), layers)}
    missing = [file for file, path in files.items() if path is None]
    if missing:
        raise UserError(f"The checkpoint {name} lacks {', '.join(missing)}, which its index names.\nDownload or copy it again.")
    return [path for path in files.values() if path]


@dataclass(frozen=True)
class StoredWeight:
    """A weight of an open file, read whole when it is asked for: `weight[...]`."""

    file: Any
    name: str

    def __getitem__(self, _: EllipsisType) -> Tensor:
        return self.file.get_tensor(self.name)


@contextmanager
def open_weights(files: list[Path], layers: int | None) -> Iterator[dict[str, StoredWeight]]:
    """The needed weights by name. Raises UserError for a damaged file.

    Files are read and not mapped into memory: whatever was touched of a mapped file counts as this process's until the end.
    """
    with freed_memory_returned(), ExitStack() as stack:
        opened = [stack.enter_context(open_file(file)) for file in files]
        yield {name: StoredWeight(file, name) for file in opened for name in file.keys() if is_needed(name, layers)}  # noqa: SIM118


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within, what is freed goes back to the system: glibc would keep blocks of up to 32 MiB, which add up to a small model's checkpoint.

    Once a threshold has been set, glibc moves it no more: afterwards it is the highest that it would have moved it to.
    """
    give_back_freed_memory()
    set_largest_kept(64 * 1024)
    try:
        yield
    finally:
        set_largest_kept(LARGEST_KEPT)


def set_largest_kept(size: int) -> None:
    """Bytes of the largest block that glibc keeps when it is freed; of free blocks at the end of its heap it keeps twice that."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, size)
            ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 2 * size)


def give_back_freed_memory() -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def open_file(file: Path) -> Any:
    """A safetensors file of a checkpoint. Raises UserError where it is damaged."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except SafetensorError as error:
        raise cut_short(file, f": {error}") from error


def cut_short(file: Path, why: str = "") -> UserError:
    return UserError(f"The checkpoint's file {file} is damaged or cut short{why}.\nDownload or copy it again.")


def fetch(name: str, file: str, revision: str) -> Path | None:
    """Where the file lies on this machine, after a download if need be; None where the checkpoint has no such file."""
    if is_local(name):
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except RemoteEntryNotFoundError:
        return None


def commit_of(name: str, revision: str) -> str | None:
    """The commit of a model of the Hub that `revision` stands for on this machine, as its cache has it; None for a local folder."""
    config = None if is_local(name) else fetch(name, "config.json", revision)
    return config.parent.name if config and config.parent.parent.name == "snapshots" else None


def _pickled(name: str) -> list[str]:
    """Files of weights in a format that is not read; of a model on the Hub none is known."""
    return sorted(path.name for path in Path(name).glob("*") if path.suffix in PICKLED) if is_local(name) else []


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The checkpoint's index {index} is damaged or cut short.\nDownload or copy it again.") from error
