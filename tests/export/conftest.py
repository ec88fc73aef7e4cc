"""A run of the tiny model that really forgot, and what PEFT merges of it."""

import shutil
from pathlib import Path

import pytest
import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lowmem_rmu import run as command_line
from lowmem_rmu.runs import RunFolder

TINY_MODEL = Path(__file__).parent.parent.parent / "lowmem_rmu/tiny/model"
QUICK = ["rmu.steps=60", "rmu.learning_rate=1e-2", "evaluation.limit=60", "evaluation.prompts=[]", "topics.locks.corpus.held_out=0.1"]
"""Settings that forget within seconds."""


@pytest.fixture(scope="session")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose forgotten tasks fell far, and whose kept tasks stayed; read only."""
    runs_dir, app = tmp_path_factory.mktemp("runs"), typer.Typer()
    app.command()(command_line.run)
    settings = [part for setting in QUICK for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["tiny", *settings, "--runs-dir", str(runs_dir), "--name", "forgetful", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return RunFolder(runs_dir / "forgetful")


@pytest.fixture(scope="session")
def merged_by_peft(forgetful: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The update merged into the base's own checkpoint in bfloat16; read only."""
    folder = tmp_path_factory.mktemp("merged")
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, forgetful.adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(forgetful: RunFolder, tmp_path: Path) -> Path:
    """The adapter in a folder of its own."""
    return Path(shutil.copytree(forgetful.adapter, tmp_path / "adapter"))


@pytest.fixture
def merged(merged_by_peft: Path, tmp_path: Path) -> Path:
    """The merged model in a folder of its own."""
    return Path(shutil.copytree(merged_by_peft, tmp_path / "merged"))
