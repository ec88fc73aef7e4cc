"""Whether a run fits: what is refused before anything is loaded, and what is advised, by the plan itself."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lowmem_rmu.cli import run as command_line
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory import advice as fit
from lowmem_rmu.memory.advice import changed_plan, check_fits, out_of_memory, savings
from lowmem_rmu.memory.estimate import plan
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import STAGES

GPU = torch.device("cuda")
GIB = 2**30
Frees = Callable[[float], None]


@pytest.fixture
def zephyr() -> Preset:
    return load_preset("zephyr-7b")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Frees:
    """Sets how much memory there seems to be."""
    return lambda gibibytes: monkeypatch.setattr(fit, "memory_available", lambda device: int(gibibytes * GIB))


def complaint(preset: Preset) -> str:
    with pytest.raises(UserError) as raised:
        check_fits(preset, ModelSpec.of_preset(preset), GPU, STAGES)
    return str(raised.value)


def peak(preset: Preset, settings: dict[str, object]) -> float:
    return (
        max(need.total for need in changed_plan(preset, ModelSpec.of_preset(preset), GPU, STAGES, settings))
        / GIB
    )


def test_what_fits_passes(zephyr: Preset, free: Frees) -> None:
    free(24)
    check_fits(zephyr, ModelSpec.of_preset(zephyr), GPU, STAGES)


def test_it_names_the_stage_and_every_setting_that_makes_it_fit(zephyr: Preset, free: Frees) -> None:
    needed = max(need.total for need in plan(zephyr, ModelSpec.of_preset(zephyr), GPU)) / GIB
    free(needed - 0.1)
    text = complaint(zephyr)
    pattern = rf"The stage [a-z-]+ needs {needed:.2f} GiB, but {needed - 0.1:.2f} GiB are free on cuda\.\nAny one of these makes it fit:\n"
    assert re.match(pattern, text), text
    lines = text.splitlines()[2:]
    assert lines
    for line in lines:
        found = re.fullmatch(r"  (?:--(?:set|stages) \S+ ?)+: ([\d.]+) GiB", line)
        assert found, line
        assert float(found[1]) <= needed - 0.1


def test_where_no_single_setting_is_enough_several_are_named(zephyr: Preset, free: Frees) -> None:
    together: dict[str, object] = {}
    for kind in savings(zephyr):
        together |= kind[-1]
    free(peak(zephyr, together) + 0.05)
    text = complaint(zephyr)
    assert "Together these make it fit:\n" in text
    assert "--stages unlearn" in text


def test_where_nothing_is_enough_it_says_by_how_much(zephyr: Preset, free: Frees) -> None:
    free(0.5)
    assert re.search(r"Even this is [\d.]+ [GM]iB too much:\n  \S+ ", complaint(zephyr))


def test_a_run_that_cannot_fit_is_refused_before_it_begins(free: Frees, tmp_path: Path) -> None:
    free(0.001)
    app = typer.Typer()
    app.command()(command_line.run)
    result = CliRunner().invoke(app, ["tiny", "--runs-dir", str(tmp_path / "runs"), "--device", "cpu"])
    assert result.exit_code == 2
    assert "MiB are free on cpu." in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".queue"], "no run folder is begun"


@pytest.mark.parametrize("stage", ["evaluate-base", "unlearn"])
def test_after_memory_ran_out_it_names_what_needs_less(zephyr: Preset, free: Frees, stage: str) -> None:
    free(1)
    text = str(out_of_memory(zephyr, ModelSpec.of_preset(zephyr), GPU, STAGES, stage))
    assert text.startswith(f"Out of memory in the stage {stage}: the estimate is ")
    assert "1.00 GiB are free on cuda now.\nAny one of these needs less:\n" in text
    assert ("--set evaluation.batch_tokens=4096" in text) == (stage == "evaluate-base")
    assert ("--set rmu.batch_size=2 --set rmu.retain_batch_size=2" in text) == (stage == "unlearn")
    assert "--set rmu.activation_checkpointing=true" in text or stage != "unlearn"


def test_nothing_is_advised_that_is_done_already(zephyr: Preset, free: Frees) -> None:
    free(1)
    frugal = zephyr.model_copy(
        update={"rmu": zephyr.rmu.model_copy(update={"batch_size": 1, "activation_checkpointing": True})}
    )
    text = str(out_of_memory(frugal, ModelSpec.of_preset(frugal), GPU, STAGES, "unlearn"))
    assert "activation_checkpointing" not in text
    assert "batch_size" not in text
