"""Checkpoints: their files, the way back, and a write that fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.presets import ModelSettings, Rmu
from lowmem_rmu.unlearning import checkpoint
from lowmem_rmu.unlearning.checkpoint import Progress, load_checkpoint, save_checkpoint, trainable

IDS = torch.arange(5, 37).reshape(2, 16)


@pytest.fixture
def model(small_settings: ModelSettings) -> PeftModel:
    return add_adapter(load_model(small_settings, torch.device("cpu"), layers=3), Rmu(target_layer=2, adapter_layers=[1, 2], rank=4), small_settings)


def optimizer_of(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model).values(), lr=0.01)


def train(model: PeftModel, optimizer: torch.optim.AdamW, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.get_decoder()(IDS).last_hidden_state.square().mean().backward()
        optimizer.step()


def test_it_holds_safetensors_and_json_and_nothing_else(model: PeftModel, tmp_path: Path) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(2, {"bio": 6.5}))
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"state.safetensors", "progress.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
    assert json.loads((tmp_path / "checkpoint/progress.json").read_text()) == {"step": 2, "coefficients": {"bio": 6.5}}
    with safe_open(tmp_path / "checkpoint/state.safetensors", framework="pt") as tensors:
        kinds = [name.partition(".")[0] for name in tensors.keys()]  # noqa: SIM118
    assert sorted(set(kinds)) == ["exp_avg", "exp_avg_sq", "step", "weight"]
    assert len(kinds) == 4 * len(trainable(model))  # the base model is not in it


def test_weights_and_optimiser_come_back_bit_for_bit(model: PeftModel, tmp_path: Path) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(2, {"bio": 0.1 + 0.2}))
    saved = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(model, optimizer, 2)
    later = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    fresh = optimizer_of(model)
    assert load_checkpoint(tmp_path / "checkpoint", model, fresh) == Progress(2, {"bio": 0.1 + 0.2})
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trainable(model).items())
    train(model, fresh, 2)
    assert all(torch.equal(parameter, later[name]) for name, parameter in trainable(model).items())


def test_where_there_is_no_checkpoint_nothing_changes(model: PeftModel, tmp_path: Path) -> None:
    before = [parameter.detach().clone() for parameter in trainable(model).values()]
    optimizer = optimizer_of(model)
    assert load_checkpoint(tmp_path / "checkpoint", model, optimizer) is None
    assert all(torch.equal(*pair) for pair in zip(before, trainable(model).values(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("fails", ["save_file", "write_json"])
def test_a_failed_write_keeps_the_old_checkpoint(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    optimizer, folder = optimizer_of(model), tmp_path / "checkpoint"
    train(model, optimizer, 1)
    save_checkpoint(folder, model, optimizer, Progress(1, {}))
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(model, optimizer, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, fails, full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(folder, model, optimizer, Progress(2, {}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
