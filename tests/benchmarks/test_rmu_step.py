"""The benchmark runs on a small shape, and what it computes is right: the limit, the peak, the differences."""

import re
import sys

import pytest
import torch
from inline_snapshot import snapshot
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rmu_step import (
    Measured,
    PeakMemory,
    Setup,
    build_engine,
    floor_operations,
    largest_difference,
    main,
)
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.model.spec import ModelSpec
from tests.texts import plain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def test_it_prints_both_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    main(shape="tiny", random_weights=True, quantisation="none", device="cpu", batch=2, tokens=24, rounds=2)
    said = capsys.readouterr().out
    for name in ("yardstick", "engine, weights", "engine, lora"):
        assert re.search(rf"{name} +│ +\d+\.\d\d │", said)
    assert re.search(r"engine, weights .* [\de.-]+ in 4 steps", said)
    limits = [line for line in said.splitlines() if "GFLOP/s" in line]
    assert [re.sub(r"[\d.,]*\d", "<number>", line) for line in limits] == snapshot(
        [
            (
                "Limit, first epoch: <number> GFLOP that cannot be avoided, at <number> GFLOP/s: <number> s; the "
                "LoRA engine takes <number> s (<number>% of it is that)."
            ),
            (
                "Limit, warm cache: <number> GFLOP that cannot be avoided, at <number> GFLOP/s: <number> s; the "
                "LoRA engine takes <number> s (<number>% of it is that)."
            ),
        ]
    )
    [compared] = [line for line in said.splitlines() if line.endswith("(engine, weights).")]
    difference = re.search(r"\d+e[+-]\d+", compared)
    assert difference
    assert float(difference[0]) < 1e-4
    assert plain(compared, difference=difference[0]) == snapshot(
        "After 4 steps the updates of the matrices differ by <difference> of their own size (engine, "
        "weights)."
    )


def test_four_bits_and_no_yardstick_where_it_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.rmu_step.memory_available", lambda device: 2**20)
    main(shape="tiny", random_weights=True, quantisation="nf4", device="cpu", batch=2, tokens=24, rounds=1)
    said = capsys.readouterr().out
    left_out = next(line for line in said.splitlines() if " 1 MiB " in line)
    assert re.sub(r"[\d.]+ [GM]iB", "<size>", left_out) == snapshot(
        "The yardstick is left out: its two full models take <size>, <size> are free."
    )
    assert next(line.strip() for line in said.splitlines() if "2 x 24" in line) == snapshot(
        "random weights, NF4, float32 on cpu: batches of 2 x 24 tokens"
    )


def test_the_limit_lies_below_what_the_engine_computes() -> None:
    preset = load_preset(
        "tiny", ["model.quantisation=none", "rmu.target_layer=3", "rmu.adapter_layers=[1,2,3]"]
    )
    setup = Setup(preset, ModelSpec.of_preset(preset), torch.device("cpu"), True, 2, 48, 1)
    unlearning = build_engine(setup, "lora")
    for warm in (False, True):
        counted = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                unlearning.step()
            counted.append(counter.get_total_flops())
        floor = floor_operations(setup, warm)
        assert 0.5 * sum(counted) / 2 < floor < sum(counted) / 2


def test_the_peak_counts_what_was_taken_and_given_back() -> None:
    peak = PeakMemory(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert 60 * 2**20 < peak.read() < 90 * 2**20


def test_the_largest_difference_is_relative_and_zero_beside_zero() -> None:
    def measured(*losses: tuple[float, float]) -> Measured:
        return Measured("", 1, 1, 1, list(losses), {})

    assert largest_difference(
        measured((1.0, 0.0), (2.0, 4.4)), measured((1.0, 0.0), (2.0, 4.0)), None
    ) == pytest.approx(0.1)
    assert largest_difference(measured((1.0, 0.0), (2.0, 4.4)), measured((1.0, 0.0), (2.0, 4.0)), 1) == 0.0
