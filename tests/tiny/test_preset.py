"""The preset of the tiny model: it steers where the paper does, and forgets with nearly any seed."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lowmem_rmu.cli import run as command_line
from lowmem_rmu.config.loading import load_preset


def test_it_steers_a_quarter_of_the_way_up_as_the_paper_does() -> None:
    preset = load_preset("tiny")
    assert preset.model.config is not None
    assert preset.rmu.target_layer == preset.model.config["num_hidden_layers"] // 4
    assert max(preset.rmu.adapter_layers) == preset.rmu.target_layer


@pytest.mark.slow
def test_nearly_all_runs_forget_and_keep(tmp_path: Path) -> None:
    """Ten seeds that the settings were not chosen on, and two whose control vectors need more steps than others."""
    app = typer.Typer()
    app.command()(command_line.run)
    verdicts = []
    for seed in (*range(10), 11, 23):
        given = [
            "tiny",
            "--set",
            f"rmu.seed={seed}",
            "--runs-dir",
            str(tmp_path),
            "--name",
            f"seed{seed}",
            "--device",
            "cpu",
        ]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        summary = json.loads((tmp_path / f"seed{seed}/summary.json").read_text(encoding="utf-8"))
        verdicts.append((summary["verdict"]["forgotten"], summary["verdict"]["kept"]))
    assert verdicts.count(("yes", "yes")) >= 11
