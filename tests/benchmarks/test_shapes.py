"""Random models: of the right shape, cut and quantised like loaded ones, and the same every time."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from benchmarks.shapes import random_model
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.model.counts import count_weights
from lowmem_rmu.model.experts import expert_shapes
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import describe_weights, skeleton

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 3)


def config_of(preset: str) -> PretrainedConfig:
    """The preset's shape, 64 wide and with six layers."""
    shape: dict[str, Any] = dict(load_preset(preset).model.config or {})
    shared = shape["num_key_value_heads"] < shape["num_attention_heads"]
    small = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 1 if shared else 4,
    }
    return AutoConfig.for_model(**shape | small | {"vocab_size": 128, "num_hidden_layers": 6})


@pytest.mark.parametrize("preset", ["zephyr-7b", "yi-34b", "mixtral-8x7b", "smollm2-135m", "tiny"])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_first_layers_of_every_shape_are_made_and_run(preset: str, quantisation: str) -> None:
    config = config_of(preset)
    model = random_model(config, CPU, 3, quantisation, torch.float32)
    weights = count_weights(skeleton(config), [])
    counted = describe_weights(model)
    assert counted["in_4bit"] == (3 * weights.by_layer[0].linear if quantisation == "nf4" else 0)
    assert counted["weights"] == weights.up_to(3) + config.hidden_size  # the final norm
    assert isinstance(model.get_output_embeddings(), nn.Identity)
    assert [expert_shapes(layer) != {} for layer in decoder_layers(model)] == [preset == "mixtral-8x7b"] * 3
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert all(
        module.support_avx512bf16_for_cpu is False
        for module in model.modules()
        if isinstance(module, Linear4bit)
    )
    activations = run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED)
    assert activations.std() > 0
    assert config.num_hidden_layers == 6, "the caller's config stays as it is"


@pytest.mark.parametrize("preset", ["zephyr-7b", "mixtral-8x7b", "tiny"])
def test_a_whole_model_has_a_head(preset: str) -> None:
    config = config_of(preset)
    model = random_model(config, CPU, None, "none", torch.bfloat16)
    assert len(decoder_layers(model)) == 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.shape == (2, 16, 128)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (preset == "tiny")
    assert 0.019 < decoder_layers(model)[4].self_attn.q_proj.weight.float().std() < 0.021
    assert (decoder_layers(model)[4].input_layernorm.weight == 1).all()


def test_the_first_layers_are_those_of_the_whole_model() -> None:
    config = config_of("zephyr-7b")
    first, again = (random_model(config, CPU, 3, "none", torch.float32) for _ in range(2))
    whole = random_model(config, CPU, None, "none", torch.float32)
    for one, other, third in zip(
        first.model.layers.parameters(),
        again.model.layers.parameters(),
        whole.model.layers.parameters(),
        strict=False,
    ):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    q_projs = {layer.self_attn.q_proj.weight.sum().item() for layer in decoder_layers(whole)}
    assert len(q_projs) == 6


def test_named_modules_stay_unquantised() -> None:
    model = random_model(
        config_of("zephyr-7b"), CPU, 3, "nf4", torch.float32, ["model.layers.2.mlp.down_proj"]
    )
    kinds = [type(layer.mlp.down_proj) for layer in decoder_layers(model)]
    assert kinds == [Linear4bit, Linear4bit, nn.Linear]
