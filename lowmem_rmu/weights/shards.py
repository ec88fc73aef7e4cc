"""The files of a checkpoint: only those that are needed are opened or downloaded, and one weight is read at a
time.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_rmu.errors import UserError, not_reachable
from lowmem_rmu.weights.source import Source, check_no_pointer, locate, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # GPT-2, Falcon and Bloom: h; MPT: blocks
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names of its settings, in malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes
ABOVE_THE_LAYERS = re.compile(
    r"((?!embed)\w+\.)?(norm|final_norm|final_layernorm|final_layer_norm|ln_f|norm_f|lm_head|embed_out)\.(weight|bias)"
)


def is_needed(name: str, layers: int | None) -> bool:
    """Return whether a model cut to its first `layers` layers has the weight: what is below them too, but no
    final norm and no head.
    """
    if layers is None:
        return True
    number = LAYER_NUMBER.search(name)
    return int(number[1]) < layers if number else not ABOVE_THE_LAYERS.fullmatch(name)


def needed_files(weight_map: dict[str, str], layers: int | None) -> list[str]:
    """Return the files that hold what is needed, by the index of a sharded checkpoint: `{weight: file}`."""
    return sorted({file for name, file in weight_map.items() if is_needed(name, layers)})


def find_files(name: str, revision: str | None, layers: int | None) -> list[Path]:
    """Return the safetensors files to read, downloaded where `name` is on the Hub. Raises UserError where one
    is missing.
    """
    source = locate(name, revision)
    if single := source.fetch(SINGLE):
        return [single]
    if (index := source.fetch(INDEX)) is None:
        raise _without_weights(source)
    files = {file: source.fetch(file) for file in needed_files(_weight_map(index), layers)}
    if missing := [file for file, path in files.items() if path is None]:
        raise source.lacks(missing)
    return [path for path in files.values() if path]


def _without_weights(source: Source) -> UserError:
    """Return the error for a checkpoint with neither the one file nor an index; it names what is there
    instead.
    """
    if source.commit and source.listed is None:
        return not_reachable("model", source.name)
    there = sorted(
        source.listed if source.listed is not None else (path.name for path in source.folder.glob("*"))
    )
    shards = [file for file in there if file.endswith(".safetensors") and "/" not in file]
    if shards:
        return UserError(
            f"The {source.words} holds {_named(shards)}, but no {INDEX}, which says which weights lie in "
            "which file.",
            f"Download {INDEX} from where the model is from; a checkpoint in one file has the name {SINGLE}.",
        )
    others = [file for file in there if Path(file).suffix in PICKLED]
    only = f", only {_named(others)}" if others else ""
    return UserError(
        f"The {source.words} holds no *.safetensors file{only}.",
        "Other formats are not read: pickled weights can run code.",
    )


def _named(files: list[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


@dataclass(frozen=True)
class StoredWeight:
    """A weight of an open file, read whole when it is asked for: `weight[...]`."""

    file: Any
    name: str

    def __getitem__(self, _: EllipsisType) -> Tensor:
        return self.file.get_tensor(self.name)


@contextmanager
def open_weights(files: list[Path], layers: int | None) -> Iterator[dict[str, StoredWeight]]:
    """Yield the needed weights by name. Raises UserError for a damaged file.

    Files are read and not mapped into memory: whatever was touched of a mapped file counts as this process's
    until the end.
    """
    with freed_memory_returned(), ExitStack() as stack:
        opened = [stack.enter_context(open_file(file)) for file in files]
        yield {
            name: StoredWeight(file, name)
            for file in opened
            for name in file.keys()  # noqa: SIM118
            if is_needed(name, layers)
        }


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within, what is freed goes back to the system: glibc would keep blocks of up to 32 MiB, which add up to
    a small model's checkpoint.

    Once a threshold has been set, glibc moves it no more: afterwards it is the highest that it would have
    moved it to.
    """
    give_back_freed_memory()
    set_largest_kept(64 * 1024)
    try:
        yield
    finally:
        set_largest_kept(LARGEST_KEPT)


def set_largest_kept(size: int) -> None:
    """Set the size of the largest block that glibc keeps when it is freed, in bytes. Of free blocks at the
    end of its heap it keeps twice that.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, size)
            ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 2 * size)


def give_back_freed_memory() -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def open_file(file: Path) -> Any:
    """Return a safetensors file of a checkpoint. Raises UserError where it is damaged."""
    check_no_pointer(file)
    try:
        return safe_open(file, framework="pt", backend="pread")
    except SafetensorError as error:
        raise cut_short(file, f": {error}") from error


def cut_short(file: Path, why: str = "") -> UserError:
    return UserError(
        f"The checkpoint's file {file} is damaged or cut short{why}.",
        "Download or copy it again.",
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of every weight. Raises UserError for an index that is damaged, or that names files of
    other folders.
    """
    weight_map = read_json(index, "The checkpoint's index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(
            f"The checkpoint's index {index} is damaged or cut short: it has no weight_map.",
            "Download or copy it again.",
        )
    outside = sorted(
        file for file in set(weight_map.values()) if Path(file).name != file or "\\" in file or file == ".."
    )
    if outside:
        raise UserError(
            f"The checkpoint's index {index} names {outside[0]}, which is not in its folder.",
            "The files of a checkpoint lie together, next to the index: copy them there and correct the "
            "index.",
        )
    return weight_map
