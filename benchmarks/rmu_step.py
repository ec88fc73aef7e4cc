"""Yardstick and engine side by side, in one process: seconds a step, peak memory, and how far their losses
differ.

python benchmarks/rmu_step.py --shape smollm2-135m --model ./SmolLM2-135M-Instruct --quantisation none #
float32 on a CPU python benchmarks/rmu_step.py --shape zephyr-7b --random-weights # also yi-34b, mixtral-8x7b
python benchmarks/rmu_step.py ... --sinks # the cost of masking attention sinks
"""

import gc
import math
import statistics
import sys
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import psutil
import torch
import typer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from benchmarks.shapes import random_model
from benchmarks.yardstick import Padded, Yardstick
from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Corpus, Preset, Rmu, Topic
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.memory.estimate import gib, memory_available
from lowmem_rmu.model.adapters import add_adapter, trained_modules
from lowmem_rmu.model.loading import resolve_device, skeleton
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.unlearning.steering import unit_vector
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData

TOPICS, COEFFICIENT, ALPHA, RATE = ("bio", "cyber"), 6.5, 100.0, 5e-5


@dataclass(frozen=True)
class Setup:
    """What is measured: `preset` gives model and layers; two topics take turns over `rounds` batches of
    `batch` x `tokens` tokens each.

    As in the paper, both topics of a round share its retain batch.
    """

    preset: Preset
    spec: ModelSpec
    """The preset's model."""
    device: torch.device
    random_weights: bool
    batch: int
    tokens: int
    rounds: int
    coefficient: float = COEFFICIENT
    """The length of the control vector."""

    @property
    def config(self) -> PretrainedConfig:
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype(self.device)

    def sequences(self, seed: int) -> list[list[int]]:
        """Random token ids: what a step costs does not depend on what they say."""
        ids = torch.randint(
            3,
            self.config.vocab_size,
            (self.rounds * self.batch, self.tokens),
            generator=torch.Generator().manual_seed(seed),
        )
        return ids.tolist()


@dataclass(frozen=True)
class Measured:
    """Mean seconds a step, in the first epoch and with a warm cache; bytes at the peak, above what was there
    before; losses a step.
    """

    name: str
    first: float
    warm: float | None
    peak: int
    losses: list[tuple[float, float]]
    updates: dict[str, Tensor]
    """What the first epoch added to each trained matrix; none with LoRA."""


class PeakMemory:
    """Bytes above the state at the start: the allocator's peak on a GPU, else the highest resident memory
    (Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            # What an earlier measurement gave back is not to be counted as there.
            CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
            self.before = psutil.Process().memory_info().rss

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) - self.before


def timed(device: torch.device, work: Callable[[], tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    started = perf_counter()
    losses = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started, losses


def measure_engine(setup: Setup, trainable: str) -> Measured:
    """Two epochs over the same batches in the paper's order: the second finds the hidden-state cache
    filled.
    """
    peak = PeakMemory(setup.device)
    unlearning = build_engine(setup, trainable)

    step = partial(step_loss, unlearning)
    first = [timed(setup.device, step) for _ in range(len(TOPICS) * setup.rounds)]
    updates = engine_updates(unlearning)
    again = [timed(setup.device, step) for _ in first]
    return Measured(
        f"engine, {trainable}",
        mean_seconds(first),
        mean_seconds(again),
        peak.read(),
        [losses for _, losses in first],
        updates,
    )


def engine_updates(unlearning: Trainer) -> dict[str, Tensor]:
    wrappers = {
        name: module
        for name, module in unlearning.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            each.modules_to_save["default"].weight - each.original_module.weight
        )
        .detach()
        .cpu()
        for name, each in wrappers.items()
    }


def mean_seconds(timings: list[tuple[float, tuple[float, float]]]) -> float:
    return sum(seconds for seconds, _ in timings) / len(timings)


def measure_sinks(setup: Setup) -> tuple[float, float]:
    """Return the median seconds of a LoRA step with attention sinks counted and with sinks masked.

    The two engines take turns, so that both meet the same noise. No batch comes twice: each step runs the
    frozen layers.
    """
    engines = []
    for sinks in ("counted", "masked"):
        engine = build_engine(
            setup, "lora", {"padding": "masked", "sinks": sinks, "shuffle": True, "cache_gib": 0.0}
        )
        engine.step()  # the first step allocates
        engines.append(engine)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(len(TOPICS) * setup.rounds - 1):
        for engine, times in zip(engines, seconds, strict=True):
            times.append(timed(setup.device, partial(step_loss, engine))[0])
    counted, masked = (statistics.median(times) for times in seconds)
    return counted, masked


def step_loss(unlearning: Trainer) -> tuple[float, float]:
    """Take a step and return its forget and retain loss."""
    row = unlearning.step()
    return row["forget_loss"], row["retain_loss"]


def build_engine(setup: Setup, trainable: str, more: dict[str, Any] | None = None) -> Trainer:
    """Build the engine with the paper's order and losses, but for the settings in `more`."""
    preset = setup.preset
    changes = {
        "trainable": trainable,
        "modules": ["down_proj"],
        "steps": 2 * len(TOPICS) * setup.rounds,
        "cache_gib": 8.0,
    }
    as_the_paper = {"shuffle": False, "padding": "paper", "max_grad_norm": None, "learning_rate": RATE}
    rmu = preset.rmu.model_copy(
        update=changes | as_the_paper | {"batch_size": setup.batch, "retain_batch_size": None} | (more or {})
    )
    topic = Topic(
        corpus=Corpus(source="./none"),
        alpha=ALPHA,
        steering="random",
        steering_coefficient=setup.coefficient,
        max_tokens=setup.tokens,
    )
    model = cut_model(setup, rmu)
    data = TrainingData(
        {name: setup.sequences(seed) for seed, name in enumerate(TOPICS, start=1)},
        setup.sequences(0),
        pad_id=0,
    )
    return Trainer(add_adapter(model, rmu, preset.model), rmu, dict.fromkeys(TOPICS, topic), data)


def cut_model(setup: Setup, rmu: Rmu) -> PreTrainedModel:
    layers = setup.preset.rmu.target_layer + 1
    if not setup.random_weights:
        return ModelSpec(setup.preset.model, rmu).load(setup.device, layers)
    unquantised = trained_modules(skeleton(setup.config), rmu)
    return random_model(
        setup.config, setup.device, layers, setup.preset.model.quantisation, setup.dtype, unquantised
    )


def full_model(setup: Setup) -> PreTrainedModel:
    if setup.random_weights:
        return random_model(setup.config, setup.device, None, "none", setup.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        setup.preset.model.name, dtype=setup.dtype, device_map={"": setup.device}
    )
    return model


def measure_yardstick(setup: Setup) -> Measured:
    peak, rmu = PeakMemory(setup.device), setup.preset.rmu
    yardstick = Yardstick(full_model(setup), full_model(setup), rmu.adapter_layers, rmu.target_layer, RATE)
    batches = [
        [unpadded(ids) for ids in torch.tensor(setup.sequences(seed), device=setup.device).split(setup.batch)]
        for seed in range(3)
    ]
    timings = []
    for number in range(setup.rounds):
        for seed, name in enumerate(TOPICS, start=1):
            vector = (setup.coefficient * unit_vector(setup.config.hidden_size, f"{rmu.seed} {name}")).to(
                setup.device, setup.dtype
            )
            step = partial(yardstick.step, batches[seed][number], batches[0][number], vector, ALPHA)
            timings.append(timed(setup.device, step))
    size = peak.read()
    updates = {
        name: (matrix - yardstick.frozen.get_parameter(name)).detach().cpu()
        for name, matrix in yardstick.matrices.items()
    }
    return Measured(
        "yardstick", mean_seconds(timings), None, size, [losses for _, losses in timings], updates
    )


def unpadded(ids: Tensor) -> Padded:
    return Padded(ids, torch.ones_like(ids))


def floor_operations(setup: Setup, warm: bool) -> float:
    """Floating-point operations of a LoRA step that no ordering of the work can avoid: 2 a weight and token,
    a pass.

    Frozen and updated path part at the first adapted `down_proj`; all before it runs once (for a retain batch
    once in both topics' turns), and not at all with a warm cache. The backward pass carries gradients through
    the updated layers above the first. Adapters and element-wise work are left out.
    """
    rmu, tokens = setup.preset.rmu, setup.batch * setup.tokens
    weights = setup.spec.weights(rmu.modules).by_layer[0].linear
    # Causal: half of 2 products of 2 operations.
    attention = 2 * tokens * setup.tokens * setup.config.hidden_size
    layer = 2 * tokens * weights + attention
    first, above = min(rmu.adapter_layers), rmu.target_layer - min(rmu.adapter_layers)
    updated = 2 * above * (layer + layer + attention)  # forget and retain, there and back
    return updated + (0 if warm else 1.5 * (first + 1) * layer + 0.5 * above * layer)


def matrix_rate(setup: Setup) -> float:
    """Operations a second of the MLP's own matrix product, the best of ten."""
    left = torch.randn(
        setup.batch * setup.tokens, setup.config.hidden_size, device=setup.device, dtype=setup.dtype
    )
    right = torch.randn(
        setup.config.hidden_size, setup.config.intermediate_size, device=setup.device, dtype=setup.dtype
    )
    best = min(timed(setup.device, lambda: ((left @ right)[0, 0].item(), 0.0))[0] for _ in range(10))
    return 2 * left.numel() * right.shape[1] / best


def largest_difference(engine: Measured, yardstick: Measured, steps: int | None) -> float:
    """Of the losses, relative to the yardstick's, over the steps that both made; a retain loss of 0 in both
    is no difference.
    """
    pairs = [
        pair
        for one, other in list(zip(engine.losses, yardstick.losses, strict=False))[:steps]
        for pair in zip(one, other, strict=True)
    ]
    return max(abs(one - other) / abs(other) if other else abs(one) for one, other in pairs)


def print_update_difference(engine: Measured, yardstick: Measured) -> None:
    worst = max(
        ((engine.updates[name] - update).norm() / update.norm()).item()
        for name, update in yardstick.updates.items()
    )
    print(
        f"After {len(yardstick.losses)} steps the updates of the matrices differ by {worst:.0e} of "
        f"their own size ({engine.name})."
    )


def print_table(setup: Setup, engines: list[Measured], yardstick: Measured | None) -> None:
    precision = "NF4" if setup.preset.model.quantisation == "nf4" else "not quantised"
    weights = "random weights" if setup.random_weights else setup.preset.model.name
    title = (
        f"{weights}, {precision}, {str(setup.dtype).removeprefix('torch.')} on {setup.device}: batches of "
        f"{setup.batch} x {setup.tokens} tokens"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "",
        "s a step",
        "speed",
        "warm cache",
        "speed",
        "peak memory",
        "share",
        "losses differ by",
    ):
        table.add_column(column, justify="right" if column else "left")
    if yardstick:
        table.add_row(yardstick.name, f"{yardstick.first:.2f}", "1.0x", "", "", gib(yardstick.peak), "1", "")
    for each in engines:
        ratios = ["", "", "", ""]
        if yardstick:
            steps = None if "weights" in each.name else 1  # LoRA takes another path from the second step on
            differ = (
                f"{largest_difference(each, yardstick, steps):.0e} in {steps or len(yardstick.losses)} steps"
            )
            speeds = [f"{yardstick.first / seconds:.1f}x" for seconds in (each.first, each.warm or math.nan)]
            ratios = [*speeds, f"1/{yardstick.peak / each.peak:.1f}", differ]
        table.add_row(
            each.name,
            f"{each.first:.2f}",
            ratios[0],
            f"{each.warm:.2f}",
            ratios[1],
            gib(each.peak),
            ratios[2],
            ratios[3],
        )
    console = Console(width=150)
    console.print(table)
    rate, lora = matrix_rate(setup), engines[-1]
    for label, seconds, warm in (("first epoch", lora.first, False), ("warm cache", lora.warm or 1, True)):
        floor = floor_operations(setup, warm) / rate
        work = (
            f"{floor_operations(setup, warm) / 1000000000.0:.0f} GFLOP that cannot be avoided, at "
            f"{rate / 1000000000.0:.0f} GFLOP/s: {floor:.2f} s"
        )
        console.print(
            (
                f"Limit, {label}: {work}; the LoRA engine takes {seconds:.2f} s ({floor / seconds:.0%} of "
                "it is that)."
            ),
            highlight=False,
        )


def yardstick_fits(setup: Setup) -> bool:
    """Two full models, and the activations of every layer above the first updated one."""
    weights = setup.spec.weights(setup.preset.rmu.modules).total()
    needed = 2 * weights * torch.empty((), dtype=setup.dtype).element_size() * 1.2
    if fits := needed < memory_available(setup.device):
        return fits
    print(
        f"The yardstick is left out: its two full models take {gib(int(needed))}, "
        f"{gib(memory_available(setup.device))} are free."
    )
    return False


def main(
    shape: Annotated[
        str, typer.Option(help="The preset whose model, layers and modules are measured.")
    ] = "smollm2-135m",
    model: Annotated[str | None, typer.Option(help="A local folder with the model's weights.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make weights up: nothing is loaded.")
    ] = False,
    quantisation: Annotated[str | None, typer.Option(help="nf4 or none; the preset's if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    tokens: Annotated[int, typer.Option(min=2)] = 512,
    rounds: Annotated[
        int, typer.Option(min=1, help="Distinct batches a topic: the engine goes through them twice.")
    ] = 2,
    coefficient: Annotated[
        float, typer.Option(min=0.1, help="Length of the control vector: longer for large activations.")
    ] = COEFFICIENT,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Only compare steps with sinks masked and counted.")
    ] = False,
) -> None:
    """Measures the engine with whole matrices and with LoRA, then the yardstick where it fits."""
    quiet_libraries()
    logging.set_verbosity_error()
    with friendly_exit():
        changes = [f"model.name={model}"] * bool(model) + [f"model.quantisation={quantisation}"] * bool(
            quantisation
        )
        preset = load_preset(shape, changes)
        spec = ModelSpec.of_preset(preset)
        setup = Setup(
            preset, spec, resolve_device(device), random_weights, batch, tokens, rounds, coefficient
        )
        if sinks:
            counted, masked = measure_sinks(setup)
            print(
                f"Seconds per step: sinks counted {counted:.2f}, masked {masked:.2f}; ratio "
                f"{masked / counted:.3f}."
            )
            return
        dense = bool(
            trained_modules(skeleton(setup.config), preset.rmu.model_copy(update={"trainable": "weights"}))
        )
        engines = [
            measure_engine(setup, trainable)
            for trainable in ("weights", "lora")
            if dense or trainable == "lora"
        ]
        yardstick = measure_yardstick(setup) if dense and yardstick_fits(setup) else None
        print_table(setup, engines, yardstick)
        if yardstick:
            print_update_difference(engines[0], yardstick)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
