"""The interface of an attack: what it asks, what it costs, and one function that tries it piece by piece."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from lowmem_rmu.audit.context import Audited
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.runs.files import add_lines, read_lines, write_lines


@dataclass(frozen=True)
class Piece:
    """The shape of a line of an attack's file."""

    key: str
    value: Any
    sum: int | None = None
    """CRC-32 of the value, so that a damaged one is computed again; older audits have none."""

    def __post_init__(self) -> None:
        if self.sum is not None and self.sum != checksum(self.value):
            raise ValueError("the checksum differs")


def checksum(value: Any) -> int:
    """CRC-32 of what JSON holds of a value."""
    return crc32(json.dumps(value).encode())


class Pieces:
    """What an attack computes, piece by piece: each is kept in a file as soon as it is there, and not
    computed again.

    So an attack is a plain function from its beginning to its end, and one that was stopped continues when it
    is called again.
    """

    def __init__(self, path: Path, before: Callable[[str], None] = lambda key: None) -> None:
        """`before` hears which piece comes next, and may raise to stop there."""
        self.path, self.before = path, before
        rows = read_lines(path, Piece)
        self.known = {piece.key: piece.value for piece in rows}
        if rows:
            write_lines(path, rows)  # without the line that a kill may have torn

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the value of a piece: the kept one, or else what `compute` returns (anything that JSON can
        hold).
        """
        if key not in self.known:
            self.before(key)
            self.keep(key, compute())
        return self.known[key]

    def keep(self, key: str, value: Any) -> None:
        add_lines(self.path, [Piece(key, value, checksum(value))])
        self.known[key] = value


@dataclass(frozen=True)
class Tried:
    """What an attack came to."""

    conditions: dict[str, Values]
    """By what was done: what the attacked model knows of each item of `Audited.knowledge`. None where
    recovery is not what is asked.
    """
    details: dict[str, Any] = field(default_factory=dict)
    """Further curves and tables of the attack."""
    sentences: list[str] = field(default_factory=list)
    """What it says in words."""
    base: dict[str, Values] = field(default_factory=dict)
    """What the base model knows where the same was done to it, of the conditions where that was measured."""


@dataclass(frozen=True)
class Cost:
    """What an attack will take, in measurements of all knowledge and in tokens that are trained on; and what
    stays in memory meanwhile.
    """

    measurements: float
    training_tokens: int = 0
    training_batch: int = 0
    """Tokens that go through a backward pass at once."""
    extra_bytes: int = 0


@dataclass(frozen=True)
class Attack:
    """One file of this folder each."""

    name: str
    asks: str
    """What it is to find out, in a few words."""
    cost: Callable[[Audited], Cost]
    run: Callable[[Audited, Pieces], Tried]
    lacks: Callable[[Audited], str | None] = lambda audited: None
    """Why it cannot be tried here."""
    recovers: bool = True
    """Whether it asks what can be recovered."""


def seed_of(audited: Audited, key: str) -> int:
    """Return the seed of a piece, so that the piece is the same whatever came before it."""
    return int.from_bytes(sha256(f"{audited.seed} {key}".encode()).digest()[:4], "little")


def in_words(audited: Audited, values: Values) -> str:
    """Return what is known of all items, as the end of a sentence."""
    figure = audited.knowledge.figure(values)
    return f"{100 * figure:.1f}% right" if audited.knowledge.are_questions else f"{figure:.2f} nats/token"
