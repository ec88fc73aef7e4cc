"""The memory plan against what is measured: a run's stages, and for each the peak that was estimated and the
peak that was reached.

    python benchmarks/memory_plan.py --preset tiny
    python benchmarks/memory_plan.py --preset smollm2-135m --quantisation none --dtype bfloat16
    python benchmarks/memory_plan.py --preset zephyr-7b --made-up-layers 4  # random weights, made-up texts

On a GPU the measure is what its allocator held. On a CPU it is the process's resident memory above what it
was once every library had been used: libraries load code and make buffers on first use, so that a short run
of the tiny model goes before. The hidden-state cache is off, for how much of it fills depends on the texts;
`--set rmu.cache_gib=1` turns it on.
"""

import gc
import sys
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.run import parse_stages
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Corpus, Preset, Task
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.inputs import read_inputs
from lowmem_rmu.memory.estimate import StageNeed, gib, memory_in_use, plan, reset_peak
from lowmem_rmu.model.loading import keep_layers, resolve_device
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.pipeline import RunContext, run_config, run_stages
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.runs.status import StatusWriter
from lowmem_rmu.weights import shards

TINY = Path(__file__).resolve().parent.parent / "lowmem_rmu/tiny"


class Meter:
    """Follows a job and notes the peak of each stage."""

    def __init__(self, device: torch.device, before: int) -> None:
        self.device, self.before = device, before
        self.stage: str | None = None
        self.peaks: dict[str, int] = {}

    def started(self, stage: str, total: int) -> None:
        if self.stage is not None and self.stage != stage:
            self.note()
        self.stage = stage

    def note(self) -> None:
        assert self.stage is not None
        self.peaks[self.stage] = memory_in_use(self.device) - self.before

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        pass

    def noted(self, sentence: str) -> None:
        pass

    def asks_to_stop(self) -> bool:
        return False


def measure(preset: Preset, device: torch.device, stages: list[str]) -> dict[str, int]:
    """Bytes at the peak of each stage; the first loads the model."""
    spec = ModelSpec.of_preset(preset)
    inputs = read_inputs(preset, spec, stages)
    gc.collect()
    shards.give_back_freed_memory()
    reset_peak(device)
    meter = Meter(device, memory_in_use(device))
    with TemporaryDirectory() as runs:
        folder = RunFolder.create(Path(runs), "measured")
        write_json(folder.path / "config.json", run_config("measured", preset, device))
        run_stages(
            RunContext(
                preset, spec, folder, inputs, device, stages, StatusWriter(folder.path / "status.json", meter)
            )
        )
        meter.note()
    return meter.peaks


def return_freed_memory() -> None:
    """Glibc keeps freed blocks of up to 32 MiB for later, which is as much again as a small model needs; now
    it gives them back.
    """
    shards.LARGEST_KEPT = 2**15
    shards.set_largest_kept(shards.LARGEST_KEPT)


def use_every_library(preset: Preset, device: torch.device) -> None:
    short = ["rmu.steps=2", "evaluation.limit=1", "evaluation.max_new_tokens=2", "evaluation.prompts=[Hello]"]
    tiny = load_preset("tiny", short)
    precision = {"quantisation": preset.model.quantisation, "dtype": preset.model.dtype}
    measure(
        tiny.model_copy(update={"model": tiny.model.model_copy(update=precision)}), device, list(STAGES[:3])
    )


def made_up(preset: Preset, layers: int, folder: Path) -> Preset:
    """Return the preset with a checkpoint of random weights in its model's shape, cut to `layers`, and with
    texts that fill every sample.
    """
    config = deepcopy(ModelSpec.of_preset(preset).shape)
    keep_layers(config, layers)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    config.update(
        {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(
        (TINY / "data/retain.jsonl").read_text(encoding="utf-8"), encoding="utf-8"
    )
    corpus = Corpus(source=str(folder / "text.txt"))
    rmu = {
        "target_layer": layers - 1,
        "adapter_layers": list(range(layers))[-len(preset.rmu.adapter_layers) :],
    }
    tasks = {"questions": Task(source=str(TINY / "data/questions/compounds.jsonl"), role="kept")}
    return preset.model_copy(
        update={
            "model": preset.model.model_copy(update={"name": str(folder)}),
            "rmu": preset.rmu.model_copy(update=rmu),
            "topics": {
                name: topic.model_copy(update={"corpus": corpus}) for name, topic in preset.topics.items()
            },
            "retain": preset.retain.model_copy(update={"corpora": [corpus]}),
            "evaluation": preset.evaluation.model_copy(update={"tasks": tasks}),
        }
    )


def print_table(title: str, needs: list[StageNeed], peaks: dict[str, int]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("Stage", "Planned", "Measured", "Planned / measured"):
        table.add_column(column, justify="left" if column == "Stage" else "right")
    for need in needs:
        table.add_row(
            need.stage, gib(need.total), gib(peaks[need.stage]), f"{need.total / peaks[need.stage]:.2f}"
        )
    Console(width=120).print(table)


def main(
    preset: Annotated[str, typer.Option(help="A preset's name, or the path of a YAML file.")] = "tiny",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting; may be given again."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quantisation: Annotated[str | None, typer.Option(help="nf4 or none; the preset's if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; the preset's if left out.")] = None,
    stages: Annotated[str, typer.Option(help="Which stages, with commas between them.")] = ",".join(
        STAGES[:3]
    ),
    made_up_layers: Annotated[
        int | None, typer.Option(min=1, help="Random weights in the model's shape, so many layers of them.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            help="On a CPU: do not count freed memory that the C library keeps for later (takes longer)."
        ),
    ] = True,
) -> None:
    """Run the stages and print plan and measurement."""
    quiet_libraries()
    logging.set_verbosity_error()
    if exact and sys.platform == "linux":
        return_freed_memory()
    with friendly_exit(), TemporaryDirectory() as folder:
        given = {"model.quantisation": quantisation, "model.dtype": dtype}
        changes = [
            "rmu.cache_gib=0",
            *(set_ or []),
            *(f"{key}={value}" for key, value in given.items() if value),
        ]
        chosen, on, wanted = load_preset(preset, changes), resolve_device(device), parse_stages(stages)
        if made_up_layers:
            chosen = made_up(chosen, made_up_layers, Path(folder))
        use_every_library(chosen, on)
        peaks = measure(chosen, on, wanted)
        needs = plan(chosen, ModelSpec.of_preset(chosen), on, wanted)
        print_table(f"{preset}, {chosen.model.quantisation}, {chosen.model.dtype} on {on}", needs, peaks)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
