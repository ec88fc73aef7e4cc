"""The presets as this machine sees them, and a preset with the settings that somebody chose on the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from markupsafe import Markup

from lowmem_rmu.config.loading import load_preset, preset_names
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.estimate import gib, memory_available, peak_of, plan
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.ui import markup

TIGHT = 0.85
"""Of what is free: a plan above this share runs only if nothing else wants memory meanwhile."""
SLOW = 1e9
"""Parameters from which a run on a processor takes hours or days."""

PLACES = ("source", "name", "revision", "subset", "split", "examples_split")
"""Settings that say what is read; a split may be the path of a folder."""


@dataclass(frozen=True)
class Offer:
    """A preset, and bytes that it needs at its peak."""

    name: str
    title: str
    topics: tuple[str, ...]
    parameters: int
    needed_here: int
    needed_on_gpu: int


@cache
def offers(device: torch.device) -> list[Offer]:
    """Return all presets, the smallest first."""
    return sorted((_offer(name, device) for name in preset_names()), key=lambda offer: offer.needed_here)


def _offer(name: str, device: torch.device) -> Offer:
    preset = load_preset(name)
    spec = ModelSpec.of_preset(preset)
    return Offer(
        name=name,
        title=preset.title,
        topics=tuple(preset.topics),
        parameters=spec.weights(preset.rmu.modules).total(),
        needed_here=peak_of(plan(preset, spec, device)),
        needed_on_gpu=peak_of(plan(preset, spec, torch.device("cuda"))),
    )


def fit(needed: int, free: int) -> str:
    return "fits here" if needed <= TIGHT * free else "tight" if needed <= free else "does not fit"


def why(offer: Offer, device: torch.device) -> str:
    """Return in a sentence or two whether the preset suits this machine."""
    free = memory_available(device)
    where = (
        f"the GPU {torch.cuda.get_device_name(device)}"
        if device.type == "cuda"
        else "this computer's main memory"
    )
    sentence = f"It needs {gib(offer.needed_here)}; {gib(free)} are free in {where} now."
    if fit(offer.needed_here, free) == "tight":
        sentence += " Close other programs first."
    if device.type == "cpu" and offer.parameters >= SLOW:
        sentence += " No NVIDIA GPU was found: on the processor alone this takes many hours, or days."
    return sentence


def label(offer: Offer, device: torch.device) -> str:
    """Return a line to choose it by."""
    words = fit(offer.needed_here, memory_available(device))
    slow = (
        ", but slow without a GPU"
        if words != "does not fit" and device.type == "cpu" and offer.parameters >= SLOW
        else ""
    )
    return f"{offer.name}: {offer.title} ({words}{slow})"


def table(device: torch.device) -> list[dict[str, Any]]:
    """Return a row per preset, as the page and its API list them; memory in GiB."""
    free = memory_available(device)
    return [
        {
            "preset": offer.name,
            "title": offer.title,
            "forgets": list(offer.topics),
            "parameters": offer.parameters,
            "gpu_memory_gib": round(offer.needed_on_gpu / 2**30, 2),
            "memory_here_gib": round(offer.needed_here / 2**30, 2),
            "fit": fit(offer.needed_here, free),
            "why": why(offer, device),
        }
        for offer in offers(device)
    ]


def table_html(device: torch.device) -> str:
    heads = ("Preset", "Forgets", "Parameters", "GPU memory needed", "On this machine")
    rows = [
        (
            row["preset"],
            ", ".join(row["forgets"]),
            _count(row["parameters"]),
            gib(int(row["gpu_memory_gib"] * 2**30)),
            f"{row['fit']}. {row['why']}",
        )
        for row in table(device)
    ]
    return markup.table(heads, rows)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def chosen(
    preset_name: str | None, changes: dict[str, Any], lines: str = "", labels: Mapping[str, str] | None = None
) -> Preset:
    """Return the preset with other settings: `changes` by dotted path, and `key.path=value` a line. Raises
    UserError for every mistake at once.

    `labels` say by dotted path what the page calls the field of a change, for messages. No line may name
    another model or another text: from a page, only what lies in the runs folder or in a preset is read.
    """
    if not preset_name or preset_name not in preset_names():
        raise UserError("Choose one of the presets first.")
    given = [f"{path}={'null' if value is None else value}" for path, value in changes.items()]
    given += [
        line.strip() for line in lines.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    # A line that says a field's setting once more is what counts, and what a mistake of it has to name.
    in_lines = {line.partition("=")[0].strip() for line in lines.splitlines()}
    of_fields = {
        path: label for path, label in (labels or {}).items() if path in changes and path not in in_lines
    }
    preset = load_preset(preset_name, given, of_fields)
    if _places(preset.model_dump()) != _places(load_preset(preset_name).model_dump()):
        raise UserError(
            "A setting names another model, text or questions: that cannot be done from the page.",
            "Drop your own text in above, or put a preset of your own into the folder presets/ and start "
            "the app again.",
        )
    return preset


def _places(settings: Any) -> list[str]:
    """Everything that is read from somewhere: models, texts, questions."""
    if isinstance(settings, dict):
        own = [
            f"{key}={value}"
            for key, value in settings.items()
            if key in PLACES and not isinstance(value, dict)
        ]
        return own + [place for value in settings.values() for place in _places(value)]
    return [place for value in settings for place in _places(value)] if isinstance(settings, list) else []


def plan_html(preset: Preset, device: torch.device) -> str:
    """Return the memory plan, a row a stage, and whether it fits."""
    needs, free = plan(preset, ModelSpec.of_preset(preset), device), memory_available(device)
    rows = []
    for need in needs:
        together = Markup("<strong>{}</strong>").format(gib(need.total))
        cache = gib(need.cache) if need.cache else "–"
        rows.append((need.stage, together, gib(need.weights), gib(need.working), cache))
    words = fit(peak_of(needs), free)
    amounts = f"{gib(peak_of(needs))} at most, {gib(free)} free on this machine now."
    verdict = Markup("<p class='rmu-fit'><strong>{}</strong>: {}</p>").format(words.capitalize(), amounts)
    return markup.joined([verdict, markup.table(("Stage", "Together", "Model", "Working", "Cache"), rows)])
