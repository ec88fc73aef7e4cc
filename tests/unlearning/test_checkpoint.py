"""Checkpoints: their files, the way back, and a write that fails."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem_rmu.config.schema import Corpus, ModelSettings, Rmu, Topic
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.unlearning import checkpoint
from lowmem_rmu.unlearning.checkpoint import Progress, load_checkpoint, save_checkpoint, trainable

IDS = torch.arange(5, 37).reshape(2, 16)
SETTINGS = {"rmu": {"learning_rate": 0.01, "adapter_layers": [1, 2]}, "topics": {"bio": {"alpha": 3.0}}}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}


@pytest.fixture
def model(small_settings: ModelSettings) -> PeftModel:
    return add_adapter(
        load_model(small_settings, torch.device("cpu"), layers=3),
        Rmu(target_layer=2, adapter_layers=[1, 2], rank=4),
        small_settings,
    )


def optimizer_of(model: PeftModel, name: str = "adamw") -> torch.optim.Optimizer:
    return OPTIMIZERS[name](trainable(model).values(), lr=0.01)


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.get_decoder()(IDS).last_hidden_state.square().mean().backward()
        optimizer.step()


def read_metadata(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def test_it_is_one_safetensors_file_without_the_base_model(model: PeftModel, tmp_path: Path) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(2, {"bio": 6.5}, ["0-1"]), SETTINGS)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["state.safetensors"]
    about = read_metadata(tmp_path / "checkpoint")
    assert about["progress"] == {"step": 2, "coefficients": {"bio": 6.5}, "cached": ["0-1"], "checks": []}
    assert about["settings"] == SETTINGS
    with safe_open(tmp_path / "checkpoint/state.safetensors", framework="pt") as tensors:
        kinds = [name.partition(".")[0] for name in tensors.keys()]  # noqa: SIM118
    assert (kinds.count("weight"), kinds.count("optimizer")) == (
        len(trainable(model)),
        3 * len(trainable(model)),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lora", "weights"])
def test_weights_and_optimiser_come_back_bit_for_bit(
    small_settings: ModelSettings, tmp_path: Path, name: str, kind: str
) -> None:
    rmu = Rmu(target_layer=2, adapter_layers=[1, 2], rank=64, trainable=kind)
    model = add_adapter(load_model(small_settings, torch.device("cpu"), layers=3), rmu, small_settings)
    optimizer = optimizer_of(model, name)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(2, {"bio": 0.1 + 0.2}), SETTINGS)
    saved = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(model, optimizer, 2)
    later = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    assert not any(torch.equal(saved[name], later[name]) for name in saved)
    fresh = optimizer_of(model, name)
    assert load_checkpoint(tmp_path / "checkpoint", model, fresh, SETTINGS) == Progress(2, {"bio": 0.1 + 0.2})
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trainable(model).items())
    train(model, fresh, 2)
    assert all(torch.equal(parameter, later[name]) for name, parameter in trainable(model).items())


def test_eight_bit_moments_take_a_quarter(small_settings: ModelSettings, tmp_path: Path) -> None:
    sizes, rmu = {}, Rmu(target_layer=2, adapter_layers=[2], rank=64)
    for name in OPTIMIZERS:
        model = add_adapter(load_model(small_settings, torch.device("cpu"), layers=3), rmu, small_settings)
        optimizer = optimizer_of(model, name)
        train(model, optimizer, 1)
        states = [
            tensor
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if key.startswith(("exp_avg", "state"))
        ]
        sizes[name] = sum(tensor.nbytes for tensor in states)
    assert sizes["adamw8bit"] * 4 == sizes["adamw"]


def test_where_there_is_no_checkpoint_nothing_changes(model: PeftModel, tmp_path: Path) -> None:
    before = [parameter.detach().clone() for parameter in trainable(model).values()]
    optimizer = optimizer_of(model)
    assert load_checkpoint(tmp_path / "checkpoint", model, optimizer, SETTINGS) is None
    assert all(torch.equal(*pair) for pair in zip(before, trainable(model).values(), strict=True))
    assert not optimizer.state


def test_a_checkpoint_of_other_settings_is_refused_and_changes_nothing(
    model: PeftModel, tmp_path: Path
) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(1), SETTINGS)
    train(model, optimizer, 1)
    before = [parameter.detach().clone() for parameter in trainable(model).values()]
    others = {"rmu": SETTINGS["rmu"] | {"learning_rate": 0.02}, "topics": {"bio": {"alpha": 4.0}}}
    with pytest.raises(UserError) as raised:
        load_checkpoint(tmp_path / "checkpoint", model, optimizer, others)
    assert str(raised.value) == (
        f"The checkpoint in {tmp_path / 'checkpoint'} was made with other settings: rmu.learning_rate, topics.bio.alpha.\n"
        "Give the same ones, or start a new run."
    )
    assert all(torch.equal(*pair) for pair in zip(before, trainable(model).values(), strict=True))


@pytest.mark.parametrize("fails", ["save_file", "os.fsync"])
def test_a_failed_write_keeps_the_old_checkpoint(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    optimizer, folder = optimizer_of(model), tmp_path / "checkpoint"
    train(model, optimizer, 1)
    save_checkpoint(folder, model, optimizer, Progress(1), SETTINGS)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(model, optimizer, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(*((checkpoint, fails) if fails == "save_file" else (os, "fsync")), full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(folder, model, optimizer, Progress(2), SETTINGS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_a_checkpoint_of_an_earlier_contrastive_run_belongs_to_the_raw_direction(
    model: PeftModel, tmp_path: Path
) -> None:
    def settings(**more: Any) -> dict[str, Any]:
        return {"rmu": SETTINGS["rmu"], "topics": {"bio": {"alpha": 3.0, "steering": "contrastive"} | more}}

    optimizer = optimizer_of(model)
    save_checkpoint(tmp_path, model, optimizer, Progress(2), settings())
    assert load_checkpoint(tmp_path, model, optimizer, settings(contrastive_direction="raw")) == Progress(2)
    with pytest.raises(UserError, match=r"made with other settings: topics\.bio\.contrastive_direction"):
        load_checkpoint(tmp_path, model, optimizer, settings(contrastive_direction="unit"))


def test_a_checkpoint_of_a_version_without_later_settings_is_gone_on_with(
    model: PeftModel, tmp_path: Path
) -> None:
    """Every setting that has come since is missing from it, and means what that version did."""
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], sinks="counted", guard_every=0).model_dump()
    topic = Topic(corpus=Corpus(source="./bio.txt", detokenize=False), alpha=3.0, questions=0).model_dump()
    current = {"rmu": rmu, "topics": {"bio": topic}}
    later = ("sinks", "guard_every", "guard_limit", "schedule")
    former = {
        "rmu": {key: value for key, value in rmu.items() if key not in later},
        "topics": {"bio": {key: value for key, value in topic.items() if key != "questions"}},
    }
    former["topics"]["bio"]["corpus"] = {
        key: value for key, value in topic["corpus"].items() if key != "detokenize"
    }
    optimizer = optimizer_of(model)
    save_checkpoint(tmp_path, model, optimizer, Progress(2), former)
    assert load_checkpoint(tmp_path, model, optimizer, current) == Progress(2)
    current["rmu"] = rmu | {"schedule": "linear"}
    with pytest.raises(UserError, match=r"made with other settings: rmu\.schedule"):
        load_checkpoint(tmp_path, model, optimizer, current)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-100],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: b"garbage" * 99,
        lambda content: b"{}",
        lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        lambda content: content.replace(b"progress", b"progrens", 1),
        lambda content: content.replace(b"lora_A", b"lora_C", 1),
        lambda content: content.replace(b'\\"step\\": 2', b'\\"step\\": x', 1),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_trained_on_it(
    model: PeftModel, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    optimizer, folder = optimizer_of(model), tmp_path / "checkpoint"
    train(model, optimizer, 2)
    save_checkpoint(folder, model, optimizer, Progress(2), SETTINGS)
    file = folder / "state.safetensors"
    before = file.read_bytes()
    file.write_bytes(spoil(before))
    assert file.read_bytes() != before
    words = rf"^The checkpoint {file} is damaged .*\nPut it back .*, or delete {folder} and train again .* --resume --name "
    with pytest.raises(UserError, match=words):
        load_checkpoint(folder, model, optimizer, SETTINGS)


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_read(
    model: PeftModel, tmp_path: Path
) -> None:
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path, model, optimizer, Progress(2), SETTINGS)
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {key: value for key, value in file.metadata().items() if key != "sums"}
    save_file(tensors, tmp_path / "state.safetensors", about)
    assert load_checkpoint(tmp_path, model, optimizer, SETTINGS) == Progress(2)
