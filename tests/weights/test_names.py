"""What the tensors of checkpoints are in the model, beside what transformers itself loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3MoeConfig

from lowmem_rmu.model.loading import skeleton
from lowmem_rmu.weights.names import model_parts
from lowmem_rmu.weights.stored import Part


def assert_parts_are_the_models(folder: Path) -> dict[str, Part]:
    """Every tensor is found again in the loaded model where its part says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    parts = model_parts(skeleton(AutoConfig.from_pretrained(folder)), tensors)
    assert parts.keys() == tensors.keys()
    for name, part in parts.items():
        parameter = model.get_parameter(part.parameter)
        there = parameter if part.expert is None else parameter[part.expert].chunk(part.shares)[part.share]
        assert torch.equal(there, tensors[name]), name
    return parts


def test_a_plain_model_names_its_tensors_as_it_stores_them(small_model_folder: Path) -> None:
    parts = assert_parts_are_the_models(small_model_folder)
    assert all(part == Part(name) for name, part in parts.items())


def test_mixtrals_experts_are_fused(small_mixtral_folder: Path) -> None:
    parts = assert_parts_are_the_models(small_mixtral_folder)
    gate_up, down = "model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"
    assert parts["model.layers.2.block_sparse_moe.experts.3.w3.weight"] == Part(
        gate_up, expert=3, share=1, shares=2
    )
    assert parts["model.layers.2.block_sparse_moe.experts.1.w1.weight"] == Part(
        gate_up, expert=1, share=0, shares=2
    )
    assert parts["model.layers.2.block_sparse_moe.experts.1.w2.weight"] == Part(down, expert=1)


def test_more_than_ten_experts_are_counted_and_not_spelt(
    save_random: Callable[[PretrainedConfig, Path], Path], tmp_path: Path
) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Qwen3MoeConfig(
        vocab_size=1536,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_experts=12,
        num_experts_per_tok=2,
        **shape,
    )
    parts = assert_parts_are_the_models(save_random(config, tmp_path / "model"))
    assert parts["model.layers.1.mlp.experts.11.up_proj.weight"].expert == 11


def test_what_the_model_does_not_have_is_left_out(small_model_folder: Path) -> None:
    config = AutoConfig.from_pretrained(small_model_folder)
    names = ["model.layers.9.mlp.down_proj.weight", "unheard.of", "layers.1.mlp.down_proj.weight"]
    assert model_parts(skeleton(config), names) == {names[2]: Part("model.layers.1.mlp.down_proj.weight")}
