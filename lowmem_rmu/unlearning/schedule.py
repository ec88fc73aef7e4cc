"""The training schedule: which forget and which retain batch each optimizer step trains on."""

from typing import NamedTuple

from lowmem_rmu.config.schema import Rmu
from lowmem_rmu.data.corpora import Batches

RETAIN = -1
"""Stands for the retain set where corpora are numbered; topics are numbered from 0."""


class BatchKey(NamedTuple):
    """A distinct batch: the number of its corpus (`RETAIN` for the retain set) and its number within the
    corpus.
    """

    corpus: int
    number: int

    def __str__(self) -> str:
        corpus = "retain" if self.corpus == RETAIN else str(self.corpus)
        return f"{corpus}-{self.number}"


class Turn(NamedTuple):
    """The batches of one optimizer step."""

    topic: str
    forget: BatchKey
    retain: BatchKey


def make_batches(rmu: Rmu, forget: dict[str, list[list[int]]], retain: list[list[int]]) -> dict[int, Batches]:
    """Return the batches of each topic by its number, and those of the retain set under `RETAIN`.

    With `rmu.shuffle` the batches are length-grouped and shuffled, and follow from the seed and the topic's
    name alone.
    """
    batches = {}
    for number, (name, sequences) in enumerate(forget.items()):
        batches[number] = Batches(sequences, rmu.batch_size, f"{rmu.seed} {name}" if rmu.shuffle else None)
    retain_size = rmu.retain_batch_size or rmu.batch_size
    batches[RETAIN] = Batches(retain, retain_size, f"{rmu.seed} retain" if rmu.shuffle else None)
    return batches


def make_schedule(rmu: Rmu, topics: list[str], batches: dict[int, Batches]) -> list[Turn]:
    """Return one turn per step. Topics take turns; without `rmu.shuffle` the topics of a round share its
    retain batch.

    The latter is the order of the paper's code (Li et al. 2024).
    """
    schedule = []
    for step in range(rmu.steps):
        round_number, topic = divmod(step, len(topics))
        forget = BatchKey(topic, batches[topic].at(round_number))
        retain = BatchKey(RETAIN, batches[RETAIN].at(step if rmu.shuffle else round_number))
        schedule.append(Turn(topics[topic], forget, retain))
    return schedule


def recurring(schedule: list[Turn]) -> set[BatchKey]:
    """Return the batches that occur in more than one turn: only they are worth caching."""
    seen: set[BatchKey] = set()
    again: set[BatchKey] = set()
    for turn in schedule:
        for key in (turn.forget, turn.retain):
            if key in seen:
                again.add(key)
            seen.add(key)
    return again
