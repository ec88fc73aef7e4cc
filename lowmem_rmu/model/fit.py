"""Whether a run fits into memory, and which settings would make it fit: all by the plan, before and after memory runs out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.memory import StageNeed, gib, memory_available, peak_of, plan
from lowmem_rmu.presets import Preset

Settings = dict[str, Any]
"""Dotted paths of a preset and their values; `stages` names stages of the run."""


def check_fits(preset: Preset, device: torch.device, stages: Sequence[str]) -> None:
    """Raises UserError, before anything is loaded, where the plan exceeds what the device has; it names the settings that would fit."""
    free, needs = memory_available(device), plan(preset, device, stages)
    if not _excess(needs, free) or preset.model.device_map == "auto":  # then accelerate finds room
        return
    largest = max(needs, key=lambda need: need.total)
    begin = f"The stage {largest.stage} needs {gib(largest.total)}, but {gib(free)} are free on {device}.\n"
    fitting = list(_fitting(preset, device, stages, free))
    if fitting:
        raise UserError(f"{begin}Any one of these makes it fit:{_listed(fitting)}")
    together = _together(preset, device, stages, free)
    peak = peak_of(changed_plan(preset, device, stages, together))
    if peak <= free:
        raise UserError(f"{begin}Together these make it fit:{_listed([(together, peak)])}")
    raise UserError(f"{begin}Even this is {gib(peak - free)} too much:{_listed([(together, peak)])}")


def out_of_memory(preset: Preset, device: torch.device, stages: Sequence[str], stage: str) -> UserError:
    """What needs less, after the device ran out of memory in a stage of the run."""
    free, needed = memory_available(device), peak_of(plan(preset, device, stages), stage)
    less = [(kind[0], peak) for kind in savings(preset) if 0 < (peak := peak_of(changed_plan(preset, device, stages, kind[0]), stage)) < needed]
    begin = f"Out of memory in the stage {stage}: the plan foretells {gib(needed)}, {gib(free)} are free on {device} now."
    return UserError(f"{begin}\nAny one of these needs less:{_listed(less)}" if less else begin)


def is_out_of_memory(error: BaseException) -> bool:
    """Also where it is a plain RuntimeError: the CPU's allocator says so in words only."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in words or "can't allocate memory" in words


def savings(preset: Preset) -> list[list[Settings]]:
    """Settings that save memory, by kind; of each kind the mildest first."""
    rmu, batch_tokens = preset.rmu, preset.evaluation.planned_batch_tokens
    batches = halvings(rmu.batch_size, rmu.retain_batch_size or rmu.batch_size)
    kinds: list[list[Settings]] = [
        [{"model.quantisation": "nf4"}] if preset.model.quantisation == "none" else [],
        [{"rmu.cache_gib": 0}] if rmu.cache_gib and rmu.cache_in == "memory" else [],
        [{"evaluation.batch_tokens": tokens} for tokens, _ in halvings(batch_tokens, batch_tokens)],
        [{"rmu.batch_size": forget, "rmu.retain_batch_size": retain} for forget, retain in batches],
        [{"rmu.activation_checkpointing": True}] if not rmu.activation_checkpointing else [],
        [{"stages": "unlearn"}],
    ]
    return [kind for kind in kinds if kind]


def halvings(first: int, second: int) -> list[tuple[int, int]]:
    """Both halved, and again, until both are 1."""
    if max(first, second) == 1:
        return []
    halves = max(1, first // 2), max(1, second // 2)
    return [halves, *halvings(*halves)]


def changed_plan(preset: Preset, device: torch.device, stages: Sequence[str], settings: Settings) -> list[StageNeed]:
    """The plan of the run with other settings."""
    for path, value in settings.items():
        section, _, key = path.partition(".")
        if key:
            preset = preset.model_copy(update={section: getattr(preset, section).model_copy(update={key: value})})
    return plan(preset, device, [stage for stage in stages if stage == settings.get("stages", stage)])


def _fitting(preset: Preset, device: torch.device, stages: Sequence[str], free: int) -> Iterator[tuple[Settings, int]]:
    """Of each kind of saving the mildest that makes the whole run fit by itself, and the peak that it leads to."""
    for kind in savings(preset):
        for settings in kind:
            needs = changed_plan(preset, device, stages, settings)
            if needs and not _excess(needs, free):
                yield settings, peak_of(needs)
                break


def _together(preset: Preset, device: torch.device, stages: Sequence[str], free: int) -> Settings:
    """Savings of all kinds, as far as each brings the run nearer to fitting."""
    together: Settings = {}
    excess = _excess(plan(preset, device, stages), free)
    for settings in (settings for kind in savings(preset) for settings in kind):
        needs = changed_plan(preset, device, stages, together | settings)
        if needs and (less := _excess(needs, free)) < excess:
            together, excess = together | settings, less
    return together


def _excess(needs: list[StageNeed], free: int) -> int:
    """Bytes that are missing, over all stages."""
    return sum(max(0, need.total - free) for need in needs)


def _listed(savings: list[tuple[Settings, int]]) -> str:
    """Each on a line of its own, as it is asked for, with the peak that it leads to."""
    lines = []
    for settings, peak in savings:
        words = [f"--stages {value}" if path == "stages" else f"--set {path}={str(value).lower()}" for path, value in settings.items()]
        lines.append(f"\n  {' '.join(words)}: {gib(peak)}")
    return "".join(lines)
