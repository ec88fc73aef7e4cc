"""The merged model: the update added to the checkpoint's own files, a few rows at a time, and everything else
left as it is.

    header | tensors before | an adapted matrix | tensors between | ...   a shard that holds adapted matrices
      copied, for neither shapes nor dtypes change | read, added, rounded once, written | copied | ...

A shard without adapted matrices is linked or copied whole, and so are the files next to the shards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from lowmem_rmu.errors import UserError
from lowmem_rmu.export.folder import check_room, copy_bytes, link_or_copy, new_folder, same_disk, write_whole
from lowmem_rmu.export.merge.update import Base, Update, update_of
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.weights.shards import INDEX, SINGLE
from lowmem_rmu.weights.source import COMPANIONS, CONFIG_FILE, locate, read_json
from lowmem_rmu.weights.stored import StoredTensor, as_bytes


@dataclass(frozen=True)
class Merged:
    """What was written."""

    tensors: int
    """How many are not what they were."""
    rewritten: list[str]
    """Files with such tensors; of the others that hold weights, those that are links and those that are
    copies.
    """
    linked: list[str]
    copied: list[str]
    checked: bool
    """Whether the checkpoint was seen to be the one that the run was made with."""
    untied: bool = False
    """Whether config.json was corrected: the checkpoint stores a head that it calls tied."""


def merge(run: RunFolder, to: Path, base: Base = "original", link: bool = True) -> Merged:
    """Write the whole merged model into a new folder `to`. Raises UserError as `update_of`, `new_folder` and
    `check_room` do.
    """
    update = update_of(run, base)
    with new_folder(to) as folder:
        return write_merged(update, folder, link)


def write_merged(update: Update, folder: Path, link: bool = True) -> Merged:
    """Fill an empty folder with the merged model. With `link`, files that stay as they are become hard links
    where that is possible.
    """
    shards, companions = _shards(update), companion_files(update)
    rewritten = [
        shard
        for shard, tensors in shards.items()
        if any(tensor.name in update.adapted_names for tensor in tensors)
    ]
    kept = [shard for shard in shards if shard not in rewritten]
    to_write = [
        *rewritten,
        *companions.values(),
        *(shard for shard in kept if not (link and same_disk(shard, folder))),
    ]
    check_room(folder, sum(file.stat().st_size for file in to_write))
    with one_thread():
        for shard in rewritten:
            rewrite(shard, folder / shard.name, shards[shard], update)
    linked = [shard.name for shard in kept if link_or_copy(shard, folder / shard.name, link)]
    for name, file in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        # Some are edited by hand: the original's must not change with them.
        link_or_copy(file, folder / name, link=False)
    # What was measured has the stored head, and so has what is loaded by programs that believe config.json.
    if update.untied:
        write_json(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE) | {"tie_word_embeddings": False})
    copied = [shard.name for shard in kept if shard.name not in linked]
    return Merged(
        len(update.adapted_names),
        [shard.name for shard in rewritten],
        linked,
        copied,
        update.checked,
        update.untied,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in one thread: pieces are small, and on a busy machine threads wait longer for
    each other than they compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shards(update: Update) -> dict[Path, list[StoredTensor]]:
    """Return the files of the checkpoint, and the tensors of each in the order of their places."""
    shards: dict[Path, list[StoredTensor]] = {}
    for tensor in update.tensors.values():
        shards.setdefault(tensor.file, []).append(tensor)
    if len({shard.name for shard in shards}) < len(shards) or len({shard.parent for shard in shards}) > 1:
        raise UserError(
            f"The index of the checkpoint {update.settings.name} names files of several folders.",
            "Put them into one.",
        )
    return shards


def rewrite(shard: Path, to: Path, tensors: Iterable[StoredTensor], update: Update) -> None:
    """Write the shard with its adapted matrices merged and every other byte as it was."""
    position, size = 0, shard.stat().st_size
    with shard.open("rb", buffering=0) as old, to.open("xb", buffering=0) as new:
        for tensor in tensors:
            if tensor.name in update.adapted_names:
                copy_bytes(old, new, position, tensor.start)
                for first, last in tensor.pieces():
                    write_whole(new, as_bytes(update.merged(tensor.name, tensor.rows(first, last), first)))
                position = tensor.end
        copy_bytes(old, new, position, size)


def companion_files(update: Update) -> dict[str, Path]:
    """Return the files that belong to the model besides its weights, by their names in its folder."""
    settings, shard = update.settings, next(iter(update.tensors.values())).file
    locate(settings.name, settings.revision).fetch_small_files()
    files = [file for file in (*shard.parent.glob("*"), *shard.parent.glob("*/*.jinja")) if file.is_file()]
    named = {file.relative_to(shard.parent).as_posix(): file for file in files}
    index = [INDEX] if shard.name != SINGLE else []
    return {
        name: file
        for name, file in named.items()
        if name in index or any(fnmatch(name, pattern) for pattern in COMPANIONS)
    }
