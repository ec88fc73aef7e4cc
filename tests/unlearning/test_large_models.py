"""The presets of models too large for a test, on random models of their proportions: from a 4-bit load to the reloaded adapter."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Preset, Rmu
from lowmem_rmu.model.adapters import add_adapter, base_only, load_adapter, save_adapter
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import describe_weights, load_model
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
STEPS = 4


def shrunk(preset: Preset) -> PretrainedConfig:
    """As many layers and experts as the preset's model has, and about its proportions, 64 wide (bitsandbytes wants multiples of that)."""
    shape: dict[str, Any] = dict(preset.model.config or {})
    smaller = {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 64 * round(shape["intermediate_size"] / shape["hidden_size"]),
        "num_attention_heads": 8,
        "num_key_value_heads": 8 * shape["num_key_value_heads"] // shape["num_attention_heads"],
    }
    return AutoConfig.for_model(**shape | smaller | {"initializer_range": 0.2})


def sequences(seed: int) -> list[list[int]]:
    made = random.Random(seed)
    return [[1, *(made.randrange(3, 1500) for _ in range(made.randrange(3, 20)))] for _ in range(4)]


def target_activations(model: nn.Module, rmu: Rmu) -> Tensor:
    updated = slice(min(rmu.adapter_layers), rmu.target_layer + 1)
    with torch.no_grad():
        return run_layers(model, run_trunk(model, IDS, None, updated), updated)


@pytest.mark.parametrize("name", ["yi-34b", "mixtral-8x7b"])
def test_a_preset_runs_from_loading_to_the_reloaded_adapter(
    name: str, save_random: Callable[[PretrainedConfig, Path], Path], tmp_path: Path
) -> None:
    preset = load_preset(name)
    rmu = preset.rmu.model_copy(update={"steps": STEPS, "batch_size": 2, "learning_rate": 0.01})
    config = shrunk(preset)
    settings = ModelSettings(name=str(save_random(config, tmp_path / "model")), dtype="float32")
    cut = load_model(settings, CPU, layers=rmu.target_layer + 1)
    assert len(decoder_layers(cut)) == rmu.target_layer + 1
    counted = describe_weights(cut)
    embeddings = 1536 * config.hidden_size
    assert counted["in_4bit"] > 0.95 * (counted["weights"] - embeddings)

    base = target_activations(cut, rmu)
    data = TrainingData(
        {topic: sequences(seed) for seed, topic in enumerate(preset.topics)}, sequences(99), pad_id=2
    )
    unlearning = Trainer(add_adapter(cut, rmu, settings), rmu, preset.topics, data)
    rows: list[dict[str, Any]] = []
    assert unlearning.run(tmp_path / "checkpoint", rows.append, lambda: False)
    assert [row["topic"] for row in rows] == ["bio", "cyber"] * (STEPS // 2)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["retain_loss"] == 0
    trained = target_activations(unlearning.model, rmu)
    assert not torch.allclose(trained, base, atol=1e-2)
    with base_only(unlearning.model):
        assert torch.equal(target_activations(unlearning.model, rmu), base)

    save_adapter(unlearning.model, tmp_path / "adapter")
    whole = load_adapter(load_model(settings, CPU), tmp_path / "adapter")
    assert len(decoder_layers(whole)) == config.num_hidden_layers
    assert torch.equal(target_activations(whole, rmu), trained)
    with base_only(whole):
        assert torch.equal(target_activations(whole, rmu), base)
