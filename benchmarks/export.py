"""Merging next to plain copying of the same files: seconds, and peak memory, on a sharded checkpoint with
random weights and a random adapter.

    python benchmarks/export.py  # 4.4 GB: nine layers of Zephyr-7B's shape, bfloat16, shards of 1 GB
    python benchmarks/export.py --sync --repeats 3           # all bytes on the disk before the clock stops
    python benchmarks/export.py --layers 32 --in /mnt/disk   # the whole 7B; takes twice its 14.5 GB there

Each side runs in a process of its own, in turns; what was written is deleted after each. Timed is the work
without the start of Python and its imports. Copying is `shutil.copytree`. The merge includes checking the
adapted matrices' hashes.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from benchmarks.shapes import RandomWeight
from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.model.changes import BEFORE, FIRST_FACTOR, SECOND_FACTOR, adapted_digests
from lowmem_rmu.model.loading import skeleton
from lowmem_rmu.model.saved import WEIGHTS
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.pipeline import run_config
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.weights.shards import INDEX
from lowmem_rmu.weights.stored import checkpoint_tensors

KINDS = {
    "copy": "shutil.copytree",
    "copies": "merge, everything copied",
    "links": "merge, unchanged files linked",
}
TINY = Path(__file__).resolve().parent.parent / "lowmem_rmu/tiny/model"
WORK = Path(__file__).with_name("export_work.py")


@dataclass(frozen=True)
class Took:
    """Seconds, and those of them in which a processor worked; bytes in memory with nothing but the libraries,
    and at the peak.
    """

    seconds: float
    processor: float
    libraries: int
    peak: int


def make_checkpoint(config: PretrainedConfig, folder: Path, shard_size: int) -> None:
    """Random bfloat16 weights in shards of at most so many bytes, with an index and a tokenizer."""
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    weight_map, number = dict[str, str](), 0
    for number, shard in enumerate(shards_of(config, shard_size), start=1):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def shards_of(config: PretrainedConfig, size: int) -> Iterator[dict[str, Tensor]]:
    shard, filled = dict[str, Tensor](), 0
    for name, parameter in skeleton(config).named_parameters():
        if shard and filled + 2 * parameter.numel() > size:
            yield shard
            shard, filled = {}, 0
        shard[name] = RandomWeight(name, parameter.shape, torch.device("cpu"), torch.bfloat16)[...]
        filled += 2 * parameter.numel()
    yield shard


def make_run(preset: Preset, folder: Path) -> RunFolder:
    """Make a run on the checkpoint, with a random adapter on the preset's layers and modules."""
    run, rmu = RunFolder(folder), preset.rmu
    run.adapter.mkdir(parents=True)
    write_json(run.path / "config.json", run_config("benchmark", preset, torch.device("cpu")))
    LoraConfig(
        r=rmu.rank, lora_alpha=rmu.rank, target_modules=rmu.modules, task_type="CAUSAL_LM"
    ).save_pretrained(str(run.adapter))
    generator, factors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    adapted = [f"layers.{layer}." for layer in rmu.adapter_layers]
    for name, tensor in checkpoint_tensors(preset.model).items():
        module = name.removesuffix(".weight")
        if any(layer in name for layer in adapted) and module.rpartition(".")[2] in rmu.modules:
            factors[BEFORE + module + FIRST_FACTOR] = torch.randn(rmu.rank, tensor.width, generator=generator)
            factors[BEFORE + module + SECOND_FACTOR] = 1e-3 * torch.randn(
                tensor.height, rmu.rank, generator=generator
            )
    save_file(factors, run.adapter / WEIGHTS, metadata={"format": "pt"})
    write_json(run.matrices, adapted_digests(run.adapter, ModelSpec.of_preset(preset), rmu.target_layer + 1))
    return run


def measure(kind: str, run: RunFolder, model: Path, to: Path, sync: bool) -> Took:
    command = [sys.executable, str(WORK), kind, str(run.path), str(model), str(to), "sync" if sync else ""]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    shutil.rmtree(to)
    subprocess.run(["sync"], check=True)  # nobody pays for what another has left to be written
    return Took(**json.loads(done.stdout))


def measure_all(
    run: RunFolder, model: Path, to: Path, sync: bool, repeats: int, warm_up: int
) -> dict[str, list[Took]]:
    """Each kind so many times, after rounds that do not count."""
    took: dict[str, list[Took]] = {kind: [] for kind in KINDS}
    for number in range(warm_up + repeats):
        turn = number % len(KINDS)  # each comes first, last and between as often
        for kind in [*KINDS][turn:] + [*KINDS][:turn]:
            one = measure(kind, run, model, to, sync)
            took[kind] += [one] * (number >= warm_up)
    return took


def print_table(title: str, took: dict[str, list[Took]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "",
        "s, median",
        "shortest to longest",
        "of copying",
        "s of processor",
        "peak memory",
        "above the libraries",
    ):
        table.add_column(column, justify="right" if column else "left")
    copying = median(one.seconds for one in took["copy"])
    for kind, all_of_it in took.items():
        seconds, peak = [one.seconds for one in all_of_it], max(one.peak for one in all_of_it)
        above = max(one.peak - one.libraries for one in all_of_it)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        times = [
            f"{median(seconds):.2f}",
            spread,
            f"{median(seconds) / copying:.2f}x",
            f"{median(one.processor for one in all_of_it):.2f}",
        ]
        table.add_row(KINDS[kind], *times, megabytes(peak), megabytes(above))
    Console(width=140).print(table)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def main(
    shape: Annotated[
        str, typer.Option(help="The preset whose model's shape, layers, modules and rank are taken.")
    ] = "zephyr-7b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 9,
    shard_size: Annotated[float, typer.Option(help="GB of a shard, at most.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before that do not count.")] = 1,
    sync: Annotated[
        bool, typer.Option("--sync", help="Both sides wait until all is on the disk itself.")
    ] = False,
    place: Annotated[
        Path | None,
        typer.Option("--in", help="Where the files go; the system's place for such files if left out."),
    ] = None,
) -> None:
    """Make a checkpoint, merge and copy it, and print both next to each other."""
    quiet_libraries()
    with friendly_exit(), TemporaryDirectory(dir=place) as folder:
        model, preset = Path(folder) / "model", load_preset(shape)
        config = deepcopy(ModelSpec.of_preset(preset).shape)
        config.num_hidden_layers = layers
        make_checkpoint(config, model, int(shard_size * 1e9))
        preset = preset.model_copy(
            update={"model": preset.model.model_copy(update={"name": str(model), "revision": None})}
        )
        took = measure_all(
            make_run(preset, Path(folder) / "run"), model, Path(folder) / "to", sync, repeats, warm_up
        )
        tensors, files = checkpoint_tensors(preset.model), len(list(model.glob("*.safetensors")))
        largest = max(tensor.size for tensor in tensors.values())
        weights = sum(prod(tensor.shape) for tensor in tensors.values())
        title = (
            f"{2 * weights / 1000000000.0:.2f} GB in {files} shards, largest tensor {megabytes(largest)}, "
            f"{'synced' if sync else 'not synced'}"
        )
        print_table(title, took)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
