"""The table of relearning after each variant of unlearning, on the tiny model and with hardly any steps."""

import re

import pytest
from inline_snapshot import snapshot

from benchmarks import robustness
from lowmem_rmu.audit.attacks import relearning

FEW = ["rmu.steps=2", "rmu.batch_size=2", "rmu.retain_batch_size=2"]


def test_every_variant_and_seed_has_its_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relearning, "LEARNING_RATE", relearning.LEARNING_RATE)  # which the benchmark sets
    robustness.main(
        "tiny", FEW, ["", "rmu.target_layer=3"], "0,1", limit=4, steps="2,1", learning_rate=5e-4, device="cpu"
    )
    said = capsys.readouterr().out
    assert next(line.strip() for line in said.splitlines() if "0.0005" in line) == snapshot(
        "tiny, relearned at 0.0005"
    )
    for name in ("as it is", r"rmu\.target_layer=3"):
        for seed in (0, 1):
            assert re.search(
                rf"{name} +│ +{seed} │ 100\.0 │ +[\d.]+ │ 100\.0 │ +100\.0 │ +[\d.]+ │ +[\d.]+ │ +(> )?\d │",
                said,
            )


def test_without_questions_it_is_nats_a_token() -> None:
    preset = robustness.load_preset("tiny", [*FEW, "evaluation.tasks={}", "retain.corpora.0.held_out=0.01"])
    held = robustness.measure(preset, robustness.resolve_device("cpu"), 4, (1,))
    assert 0.1 < held.base < held.unlearned < 8
    assert held.base < held.kept < 8
    assert held.measured is None
    assert held.row()[3] == "-"
    assert list(held.after) == ["1"]
