"""Whether a run fits into memory, and which settings would make it fit, all by the memory plan."""

from collections.abc import Sequence
from typing import Any

import torch

from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import ChangeSettings, Fix, UserError
from lowmem_rmu.memory.estimate import StageNeed, gib, memory_available, peak_of, plan
from lowmem_rmu.model.spec import ModelSpec

Settings = dict[str, Any]
"""Other values of settings, by dotted path; `stages` names stages of the run."""


def check_fits(preset: Preset, spec: ModelSpec, device: torch.device, stages: Sequence[str]) -> None:
    """Raise UserError where the plan exceeds what the device has. The message names the settings that would
    make it fit.
    """
    free = memory_available(device)
    needs = plan(preset, spec, device, stages)
    if peak_of(needs) <= free or preset.model.device_map == "auto":  # with `auto`, accelerate finds room
        return
    largest = max(needs, key=lambda need: need.total)
    problem = f"The stage {largest.stage} needs {gib(largest.total)}, but {gib(free)} are free on {device}."

    # Of each kind of saving, the mildest setting that is enough by itself.
    enough: list[tuple[Settings, int]] = []
    for kind in savings(preset):
        for settings in kind:
            peak = peak_of(changed_plan(preset, spec, device, stages, settings))
            if 0 < peak <= free:
                enough.append((settings, peak))
                break
    if enough:
        raise UserError(problem, advice("Any one of these makes it fit:", enough))

    # Savings of all kinds in their strongest form, one after the other, until it fits.
    together: Settings = {}
    for kind in savings(preset):
        together |= kind[-1]
        peak = peak_of(changed_plan(preset, spec, device, stages, together))
        if peak <= free:
            raise UserError(problem, advice("Together these make it fit:", [(together, peak)]))
    raise UserError(problem, advice(f"Even this is {gib(peak - free)} too much:", [(together, peak)]))


def out_of_memory(
    preset: Preset, spec: ModelSpec, device: torch.device, stages: Sequence[str], stage: str
) -> UserError:
    """Make the error for a device that ran out of memory in a stage of the run, with the settings that need
    less.
    """
    free = memory_available(device)
    needed = peak_of(plan(preset, spec, device, stages), stage)
    problem = (
        f"Out of memory in the stage {stage}: the estimate is {gib(needed)}, "
        f"{gib(free)} are free on {device} now."
    )
    less = []
    for kind in savings(preset):
        peak = peak_of(changed_plan(preset, spec, device, stages, kind[0]), stage)
        if 0 < peak < needed:
            less.append((kind[0], peak))
    return UserError(problem, advice("Any one of these needs less:", less) if less else None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; the CPU's allocator raises a plain RuntimeError that
    says so in words only.
    """
    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "not enough memory" in words
        or "can't allocate memory" in words
    )


def savings(preset: Preset) -> list[list[Settings]]:
    """Return settings that save memory, by kind; of each kind the mildest first."""
    rmu = preset.rmu
    kinds: list[list[Settings]] = []
    if preset.model.quantisation == "none":
        kinds.append([{"model.quantisation": "nf4"}])
    if rmu.cache_gib and rmu.cache_in == "memory":
        kinds.append([{"rmu.cache_gib": 0}])
    batch_tokens = preset.evaluation.planned_batch_tokens
    kinds.append([{"evaluation.batch_tokens": tokens} for tokens, _ in halvings(batch_tokens, batch_tokens)])
    batch_sizes = halvings(rmu.batch_size, rmu.retain_batch_size or rmu.batch_size)
    kinds.append(
        [{"rmu.batch_size": forget, "rmu.retain_batch_size": retain} for forget, retain in batch_sizes]
    )
    if not rmu.activation_checkpointing:
        kinds.append([{"rmu.activation_checkpointing": True}])
    kinds.append([{"stages": "unlearn"}])
    return [kind for kind in kinds if kind]


def halvings(first: int, second: int) -> list[tuple[int, int]]:
    """Return both numbers halved, and again, until both are 1."""
    found = []
    while max(first, second) > 1:
        first, second = max(1, first // 2), max(1, second // 2)
        found.append((first, second))
    return found


def changed_plan(
    preset: Preset, spec: ModelSpec, device: torch.device, stages: Sequence[str], settings: Settings
) -> list[StageNeed]:
    """Return the plan of the run with other settings."""
    for path, value in settings.items():
        section, _, key = path.partition(".")
        if key:
            preset = preset.model_copy(
                update={section: getattr(preset, section).model_copy(update={key: value})}
            )
    return plan(preset, spec, device, [stage for stage in stages if stage == settings.get("stages", stage)])


def advice(words: str, found: list[tuple[Settings, int]]) -> Fix:
    """Return the advice to choose one of several sets of settings, each with the peak that it leads to."""
    choices = tuple((settings, gib(peak)) for settings, peak in found)
    return Fix(f"{words}{{action}}", ChangeSettings(choices))
