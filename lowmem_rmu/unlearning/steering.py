"""Targets: where the activations of forget batches are pushed to. One class a way of steering, one object a
topic.
"""

import math
from hashlib import sha256
from typing import Protocol

import torch
from torch import Tensor

from lowmem_rmu.config.schema import Rmu, Topic
from lowmem_rmu.errors import UserError
from lowmem_rmu.unlearning.losses import mean_norm, median_norm

CUES = {
    "unit": ("You are a novice in {} who often makes mistakes.", "You are a world-class expert in {}."),
    "raw": ("You are a novice at {}", "You are an expert at {}"),
}
"""By `contrastive_direction`, the sentences whose last activations give the contrastive direction: to the
first, away from the second.

Those of `unit` are the authors' (`get_steering_vec` in the code of arXiv 2403.03218v1), those of `raw` are of
earlier versions of lowmem-rmu.
"""
SCALES = (1e-2, 1e3)
"""A control vector shorter or longer than so many activation norms is a mistake: the paper's own are within a
factor of 100.
"""


class Target(Protocol):
    """`coefficient` is None until it is known; it is part of every checkpoint."""

    coefficient: float | None
    needs_all: bool
    """Whether `of` looks at the frozen activations of every sample; else one sample is enough, for the
    figures that are shown.
    """

    def length(self) -> float:
        """Return the length of the push in units of activation."""

    def of(self, frozen: Tensor, counted: Tensor) -> Tensor:
        """Return the target, `(hidden,)` or `(batch, sequence, hidden)`, for a batch's frozen activations
        `(batch, sequence, hidden)`.
        """


class Random:
    """RMU: one control vector `c * u` for every token (Li et al. 2024)."""

    needs_all = False

    def __init__(self, unit: Tensor, coefficient: float | None) -> None:
        self.unit, self.coefficient = unit, coefficient

    def length(self) -> float:
        return self.coefficient or math.nan

    def of(self, frozen: Tensor, counted: Tensor) -> Tensor:
        assert self.coefficient is not None
        return self.coefficient * self.unit.to(frozen.device)


class Adaptive(Random):
    """Adaptive RMU: c is `scale` times the norm of the topic's first batch, on average over its tokens (arXiv
    2408.06223).

    The average is the paper's mean, or the median with `uses_median`.
    """

    def __init__(self, unit: Tensor, scale: float, uses_median: bool = False) -> None:
        super().__init__(unit, None)
        self.scale, self.uses_median = scale, uses_median

    @property
    def needs_all(self) -> bool:  # type: ignore[override]
        return self.coefficient is None

    def of(self, frozen: Tensor, counted: Tensor) -> Tensor:
        if self.coefficient is None:
            average = median_norm if self.uses_median else mean_norm
            self.coefficient = self.scale * average(frozen, counted)
        return super().of(frozen, counted)


class Contrastive:
    """CUT, the paper's first version (arXiv 2403.03218v1): every token's frozen activation, moved by `c *
    direction`.

    `direction` `(hidden,)` points from an expert's activation to a novice's. The authors' code scales it to
    unit length; with `contrastive_direction: raw` it is the difference itself.
    """

    needs_all = True

    def __init__(self, direction: Tensor, coefficient: float | None) -> None:
        self.direction, self.coefficient = direction, coefficient

    def length(self) -> float:
        return (self.coefficient or math.nan) * self.direction.norm().item()

    def of(self, frozen: Tensor, counted: Tensor) -> Tensor:
        assert self.coefficient is not None
        return frozen + self.coefficient * self.direction.to(frozen.device)


def cues(name: str, topic: Topic) -> list[str]:
    """Return the texts whose frozen activations the topic's target is made of: those of a novice and of an
    expert, or none.
    """
    if topic.contrastive_direction is None or topic.steering != "contrastive":
        return []
    return [cue.format(topic.about or name) for cue in CUES[topic.contrastive_direction]]


def make_target(name: str, topic: Topic, rmu: Rmu, hidden_size: int, cued: list[Tensor]) -> Target:
    """Return the topic's target, on the CPU. `cued` are the frozen activations `(hidden,)` of the last tokens
    of its `cues`.
    """
    if topic.steering == "contrastive":
        novice, expert = cued
        difference = novice.float() - expert.float()
        # Equal activations have no direction: a length of 0 is refused before the first step (`check_scale`).
        is_unit = topic.contrastive_direction == "unit" and difference.norm() > 0
        direction = difference / difference.norm() if is_unit else difference
        return Contrastive(direction.to(novice.dtype), topic.steering_coefficient)
    unit = unit_vector(hidden_size, f"{rmu.seed} {name}")
    return (
        Adaptive(unit, topic.adaptive_scale, rmu.masks_sinks)
        if topic.steering == "adaptive"
        else Random(unit, topic.steering_coefficient)
    )


def unit_vector(hidden_size: int, seed: str) -> Tensor:
    """`torch.rand(hidden)` scaled to unit norm (Li et al. 2024, section 4): positive entries, the same for
    the same seed.
    """
    generator = torch.Generator().manual_seed(_number(seed))
    vector = torch.rand(hidden_size, generator=generator)
    return vector / vector.norm()


def check_scale(name: str, move: float, activation_norm: float) -> None:
    """Raise UserError where the target lies `move` away, and activations are of quite another size."""
    scale = move / activation_norm
    if not math.isfinite(scale) or not SCALES[0] <= scale <= SCALES[1]:
        raise UserError(
            f"The control vector of {name} is {move:.3g} long, but activations at the target layer have a "
            f"norm of {activation_norm:.3g}: nothing useful can be learned.",
            f"Set topics.{name}.steering_coefficient to a few times that norm, or topics.{name}.steering to "
            "adaptive.",
        )


def _number(seed: str) -> int:
    """Return a number that depends on all of the seed's text: torch's CPU generator uses 32 bits only."""
    return int.from_bytes(sha256(seed.encode()).digest()[:4], "little")
