"""The tensors of a safetensors file where they lie: read a few rows at a time, hashed, and found by their
place in the file.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError, hub_errors
from lowmem_rmu.weights.shards import cut_short, find_files, open_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of the weights that can be merged, by safetensors' names."""
PIECE = 4 * 2**20  # bytes of a piece in float32, about: it fits into the processor's cache
# A piece begins at a multiple: few rows are multiplied by another kernel, which rounds otherwise than the
# whole product does.
ROWS = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: `size` bytes from byte `start` on, `kind` is safetensors' name of its dtype.

    Its rows are those of the matrix `(all other dimensions, last dimension)`.
    """

    file: Path
    name: str
    start: int
    size: int
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Raise UserError where it holds no weights of 16 or 32 bits."""
        if self.kind not in DTYPES:
            raise UserError(
                f"{self.name} in {self.file} is stored as {self.kind}, which cannot be merged: the "
                "checkpoint is quantised, or of a rare kind.",
                "Give the original checkpoint, in float32, float16 or bfloat16.",
            )
        return DTYPES[self.kind]

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def height(self) -> int:
        return prod(self.shape[:-1])

    def rows(self, first: int, last: int) -> Tensor:
        """Read rows again: `(last - first, width)`."""
        rows = torch.empty(last - first, self.width, dtype=self.dtype)
        self._read(as_bytes(rows), first * self.width * rows.itemsize)
        return rows

    def whole(self) -> Tensor:
        return self.rows(0, self.height).view(self.shape)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """First and last row (exclusive) of pieces of like size."""
        count = max(1, -(-self.height * self.width * 4 // PIECE))
        edges = sorted(
            {*(self.height * index // count // ROWS * ROWS for index in range(count)), self.height}
        )
        yield from zip(edges, edges[1:], strict=False)

    def digest(self) -> str:
        """sha256 of its bytes."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, self.size)))
        for start in range(0, self.size, PIECE):
            digest.update(self._read(buffer[: self.size - start], start))
        return digest.hexdigest()

    def _read(self, buffer: memoryview, start: int) -> memoryview:
        """Fill the buffer from the tensor's byte `start` on."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + start)
            filled = 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])
                if not count:
                    raise cut_short(self.file)
                filled += count
        return buffer


@dataclass(frozen=True)
class Part:
    """What a tensor of a checkpoint is: a parameter of the model, or of a fused one (`expert` is not None)
    one expert's share.

    A fused parameter's rows are, expert by expert, the first share's and then the next one's.
    """

    parameter: str
    expert: int | None = None
    share: int = 0
    shares: int = 1
    transposed: bool = False
    """Whether the parameter keeps experts' matrices as `(experts, in, out)`."""


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their places. Raises UserError for a
    damaged file.
    """
    with open_file(file), file.open("rb") as content:  # the first has checked what the second reads
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(length))
    header.pop("__metadata__", None)
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _stored(file, name, 8 + length, place) for name, place in places}


def _stored(file: Path, name: str, data: int, place: dict[str, Any]) -> StoredTensor:
    start, end = place["data_offsets"]
    return StoredTensor(file, name, data + start, end - start, place["dtype"], tuple(place["shape"]))


def checkpoint_tensors(settings: ModelSettings, layers: int | None = None) -> dict[str, StoredTensor]:
    """Find every tensor of a model's checkpoint, or of the files that hold its first layers. Raises UserError
    where it cannot be had.
    """
    with hub_errors("model", settings.name):
        files = find_files(settings.name, settings.revision, layers)
    return {name: tensor for file in files for name, tensor in stored_tensors(file).items()}
