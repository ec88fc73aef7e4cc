"""The hidden-state cache: what frozen layers give on batches that come again, computed once and kept within a
budget.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_rmu.runs.files import replaced

Entry = dict[str, Tensor]
SUFFIX = ".safetensors"


class HiddenStateCache:
    """Tensors by key, up to `budget` bytes; what does not fit is not kept. In main memory, or in `folder` if
    there is one.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.used = 0
        self.entries: dict[str, Entry | Path] = {}

    def restore(self, keys: list[str]) -> None:
        """Take up what a checkpoint names. All else in the folder may be a torn write, and goes."""
        for path in self.folder.iterdir() if self.folder is not None and self.folder.exists() else ():
            if path.stem in keys and path.suffix == SUFFIX:
                self.used += path.stat().st_size
                self.entries[path.stem] = path
            else:
                path.unlink()

    def keys(self) -> list[str]:
        return sorted(self.entries)

    def get(self, key: str, device: torch.device) -> Entry | None:
        found = self.entries.get(key)
        if isinstance(found, Path):
            return load_file(found, device=str(device))
        return None if found is None else {name: tensor.to(device) for name, tensor in found.items()}

    def put(self, key: str, entry: Entry) -> None:
        size = sum(tensor.nbytes for tensor in entry.values())
        if self.used + size > self.budget:
            return
        self.used += size
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        if self.folder is None:
            self.entries[key] = entry
            return
        self.folder.mkdir(exist_ok=True)
        with replaced(self.folder / f"{key}{SUFFIX}") as unfinished:
            save_file(entry, unfinished)
        self.entries[key] = self.folder / f"{key}{SUFFIX}"
