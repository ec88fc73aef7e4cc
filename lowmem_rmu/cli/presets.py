"""The verb `presets`, and what a preset needs."""

from pathlib import Path

from rich.table import Table

from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset, preset_names
from lowmem_rmu.console import Console


def presets() -> None:
    """List the presets."""
    quiet_libraries()
    Console().print(presets_table())


def presets_table() -> Table:
    """Make the table of the presets: model, size, memory, topics."""
    import torch

    from lowmem_rmu.memory.estimate import gib
    from lowmem_rmu.memory.estimate import plan as memory_plan
    from lowmem_rmu.model.spec import ModelSpec

    table = Table(title="Presets", title_justify="left")
    for column in ("Preset", "Model", "Parameters", "GPU memory needed", "Forgets"):
        table.add_column(column, no_wrap=column == "Preset", overflow="fold")
    for name in preset_names():
        preset = load_preset(name)
        spec = ModelSpec.of_preset(preset)
        needed = max(stage.total for stage in memory_plan(preset, spec, torch.device("cuda")))
        parameters = millions(spec.weights(preset.rmu.modules).total())
        table.add_row(name, Path(preset.model.name).name, parameters, gib(needed), ", ".join(preset.topics))
    return table


def millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
