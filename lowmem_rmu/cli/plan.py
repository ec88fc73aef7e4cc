"""The plan of a run: what would be loaded, downloaded and trained, and the memory of each stage."""

import sys
from typing import TYPE_CHECKING

from rich.table import Table

from lowmem_rmu.cli.presets import millions
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.console import Console

if TYPE_CHECKING:
    from lowmem_rmu.data.sources import Sources
    from lowmem_rmu.model.spec import ModelSpec


def print_plan(preset: Preset, device: str, stages: list[str]) -> None:
    """Print what would be loaded, downloaded and trained, and the memory that each stage needs."""
    from lowmem_rmu.data.sources import find_sources, sentences
    from lowmem_rmu.inputs import needs_text
    from lowmem_rmu.memory.estimate import gib, memory_available
    from lowmem_rmu.memory.estimate import plan as memory_plan
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.model.spec import ModelSpec

    on, console, spec = resolve_device(device), Console(), ModelSpec.of_preset(preset)
    spec.check_checkpoint()
    read = sentences(find_sources(preset, needs_text(preset, stages)), only_partly_read=False)
    evaluates, needs = (
        any(stage.startswith("evaluate") for stage in stages),
        memory_plan(preset, spec, on, stages),
    )
    for label, words in plan_lines(preset, spec, evaluates).items():
        console.print(f"{label:<10} {words}", highlight=False, soft_wrap=True)
    for sentence in read:
        console.print(f"{'Read':<10} {sentence}", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("Stage", "Weights", "Working memory", "Cache, at most", "Together"):
        table.add_column(column, justify="left" if column == "Stage" else "right")
    for need in needs:
        table.add_row(
            need.stage,
            gib(need.weights),
            gib(need.working),
            gib(need.cache) if need.cache else "-",
            gib(need.total),
        )
    console.print(table)
    console.print(
        (
            f"Free on {on} now: {gib(memory_available(on))}. The libraries themselves take about 0.6 GiB "
            "of main memory."
        ),
        highlight=False,
    )


def print_left_out(sources: "Sources") -> None:
    """Say on stderr what is read of each folder of which not everything is."""
    from lowmem_rmu.data.sources import sentences

    for sentence in sentences(sources, only_partly_read=True):
        print(f"Read for {sentence}.", file=sys.stderr, flush=True)


def plan_lines(preset: Preset, spec: "ModelSpec", evaluates: bool) -> dict[str, str]:
    """Return in words what would be loaded, downloaded and trained."""
    from lowmem_rmu.config.paths import is_local
    from lowmem_rmu.memory.estimate import gib

    weights, rmu, model = spec.weights(preset.rmu.modules), preset.rmu, preset.model
    corpora = [*(topic.corpus for topic in preset.topics.values()), *preset.retain.corpora]
    sources = [corpus.source for corpus in corpora] + [
        task.source for task in preset.evaluation.tasks.values()
    ]
    remote = sorted({source for source in sources if not is_local(source)})
    precision = "4-bit (NF4, double quantisation)" if model.quantisation == "nf4" else "not quantised"
    method = f"LoRA of rank {rmu.rank} on" if rmu.trainable == "lora" else "the matrices"
    adapted = f"{', '.join(rmu.modules)} of layers {', '.join(map(str, rmu.adapter_layers))}"
    needed = weights.total() if evaluates else weights.up_to(rmu.target_layer + 1)
    size = f"about {gib(2 * needed)} of weights in 16 bits (in whole files), unless they are cached"
    return {
        "Preset": preset.title,
        "Model": f"{model.name}: {millions(weights.total())} parameters, {precision}",
        "Download": "nothing: a local folder" if is_local(model.name) else size,
        "Data": f"{', '.join(remote)} (Hub)" if remote else "local files only",
        "Loaded": f"{weights.layers} of {weights.layers} layers"
        if evaluates
        else f"{rmu.target_layer + 1} of {weights.layers} layers, no head",
        "Trained": f"{rmu.steps} steps; {method} {adapted}: {millions(weights.learning(rmu))} parameters",
        "Steered": (
            f"the output of layer {rmu.target_layer}; layers 0 to {rmu.target_layer} run in training, the "
            "others do not"
        ),
    }
