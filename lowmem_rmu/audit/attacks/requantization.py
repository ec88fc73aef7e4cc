"""Requantisation: does it come back when the weights are kept in other precisions?

The adapter on the base in 4 bits, 8 bits, bfloat16 and float32, and merged into the checkpoint as it is
stored, then in 8 and in 4 bits: rounding to few bits may undo a small update (Zhang et al. 2024, arXiv
2410.16454). Each is loaded alone in memory.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried, in_words
from lowmem_rmu.audit.context import Audited
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.export.verification import NotAsked, check_room
from lowmem_rmu.memory.advice import is_out_of_memory
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.loading import Quantisation
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder

MERGED = "merged"


@dataclass(frozen=True)
class Way:
    """How the weights are kept; `merged`: in the checkpoint with the update in it."""

    quantisation: Quantisation
    dtype: str
    """Of what is not quantised, as in `ModelSettings`."""
    merged: bool = False

    @property
    def name(self) -> str:
        how = {"nf4": "NF4", "int8": "int8", "none": self.dtype}[self.quantisation]
        return f"{MERGED}, {how}" if self.merged else how


def ways_of(audited: Audited) -> list[Way]:
    """Return every precision except the run's own."""
    subject, adapter = subject_of(audited), isinstance(audited.sides.unlearned, Path)
    own = str(subject.dtype(audited.device)).removeprefix("torch.")
    plain = [Way("nf4", own), Way("int8", own), Way("none", "bfloat16"), Way("none", "float32")]
    stored = subject.stored_dtype
    merged = (
        [Way("none", stored, True), Way("int8", stored, True), Way("nf4", stored, True)] if adapter else []
    )
    return [way for way in plain if way != Way(subject.settings.quantisation, own)] + merged


def subject_of(audited: Audited) -> ModelSpec:
    """Return the checkpoint that is loaded: with the adapter put on it, or unlearned itself."""
    unlearned = audited.sides.unlearned
    return unlearned if isinstance(unlearned, ModelSpec) else audited.sides.base


def cost(audited: Audited) -> Cost:
    sides = [
        1 if way.merged or isinstance(audited.sides.unlearned, ModelSpec) else 2 for way in ways_of(audited)
    ]
    return Cost(sum(sides))


def requantise(audited: Audited, pieces: Pieces) -> Tried:
    found, not_asked = dict[str, dict[str, Values | None]](), dict[str, str]()
    with merged_when_asked(audited, pieces) as merged:
        for way in ways_of(audited):
            try:
                found[way.name] = pieces.get(way.name, partial(alone, audited, way, merged))
            except NotAsked as reason:
                not_asked[way.name] = str(reason)
    table = {
        name: {side: audited.knowledge.figure(values) if values else None for side, values in sides.items()}
        for name, sides in found.items()
    }
    conditions = {name: sides["unlearned"] or [] for name, sides in found.items()}
    base = {
        name: same for name in found if (same := found.get(name.removeprefix(f"{MERGED}, "), {}).get("base"))
    }
    return Tried(
        conditions,
        {"precisions": table, "not_asked": not_asked},
        list(sentences(audited, conditions, not_asked)),
        base,
    )


@contextmanager
def merged_when_asked(audited: Audited, pieces: Pieces) -> Iterator[Callable[[], ModelSettings]]:
    """Within, merges the update at the first call and gives the merged model, which is gone afterwards (a
    killed audit's with the next).
    """
    folder = pieces.path.with_name(f".{pieces.path.stem}-merged").resolve()

    run = RunFolder(Path(str(audited.sides.unlearned)).parent)

    def merged() -> ModelSettings:
        if not (run.path / "config.json").is_file():
            raise NotAsked("only a run can be merged, and the adapter lies in none")
        if not folder.exists():
            try:
                merge(run, folder)
            except UserError as error:
                raise NotAsked(f"it cannot be merged: {error}") from error
        return ModelSettings(name=str(folder), device_map=audited.sides.base.settings.device_map)

    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield merged
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alone(audited: Audited, way: Way, merged: Callable[[], ModelSettings]) -> dict[str, Values | None]:
    """Measure each item in this precision with no other model in memory (base: None where it would have to be
    loaded separately). Raises NotAsked where it does not fit.
    """
    audited.free()
    try:
        return answers(audited, way, merged)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        audited.free()
    raise NotAsked(f"out of memory on {audited.device}")


def answers(audited: Audited, way: Way, merged: Callable[[], ModelSettings]) -> dict[str, Values | None]:
    unlearned = audited.sides.unlearned
    spec = subject_of(audited).with_precision(dtype=way.dtype)
    check_room(audited.preset, spec, way.quantisation, audited.device)  # a merged model takes as much
    if way.merged:
        spec = ModelSpec(merged()).with_precision(dtype=way.dtype)
    model: Any = spec.load(audited.device, quantisation=way.quantisation)
    if way.merged or isinstance(unlearned, ModelSpec):
        return {"base": None, "unlearned": audited.knowledge.of(model)}
    model = load_adapter(model, unlearned)
    known = audited.knowledge.of(model)
    with base_only(model):
        return {"base": audited.knowledge.of(model), "unlearned": known}


def sentences(audited: Audited, conditions: dict[str, Values], not_asked: dict[str, str]) -> Iterator[str]:
    if conditions:
        least, most = (choose(conditions, key=lambda name: sum(conditions[name])) for choose in (min, max))
        shown = [f"{in_words(audited, conditions[name])} as {name}" for name in (least, most)]
        yield (
            f"In {len(conditions)} other precisions the unlearned model gives between {shown[0]} and "
            f"{shown[1]}."
        )
    for name, reason in not_asked.items():
        yield f"Not asked as {name}: {reason}."


ATTACK = Attack("requantisation", "does it come back in another precision?", cost, requantise)
