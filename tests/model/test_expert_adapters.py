"""LoRA on the fused experts of a mixture, in 4-bit: two parametrisations share one weight, and neither may harm the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, base_only, check_modules, load_adapter, save_adapter
from lowmem_rmu.model.experts import expert_shapes
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import load_model

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 4)
EXPERTS, RANK = 4, 3


def rmu_of(**changes: Any) -> Rmu:
    return Rmu(
        **{"target_layer": 3, "adapter_layers": [1, 3], "modules": ["down_proj"], "rank": RANK} | changes
    )


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def train_a_little(model: PeftModel) -> None:
    """Stands for training: the outputs move."""
    with torch.no_grad():
        for seed, parameter in enumerate(adapter_weights(model).values()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def activations(model: nn.Module, activation_checkpointing: bool = False) -> Tensor:
    return run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED, activation_checkpointing)


def gradients(model: nn.Module, activation_checkpointing: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    activations(model, activation_checkpointing).square().mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def model(mixtral_settings: ModelSettings) -> PeftModel:
    model = add_adapter(load_model(mixtral_settings, CPU), rmu_of(), mixtral_settings)
    train_a_little(model)
    return model


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_on_experts_changes_nothing_and_learns_in_float32(
    mixtral_settings: ModelSettings, quantisation: str, dtype: str
) -> None:
    settings = mixtral_settings.model_copy(update={"quantisation": quantisation, "dtype": dtype})
    base = load_model(settings, CPU)
    before = base(IDS).logits
    model = add_adapter(base, rmu_of(), settings)
    assert torch.equal(model(IDS).logits, before)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning.keys() == adapter_weights(model).keys()
    assert {name.split(".layers.")[1].split(".lora")[0] for name in learning} == {
        "1.mlp.experts",
        "3.mlp.experts",
    }
    assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    assert {tuple(parameter.shape) for parameter in learning.values()} == {
        (EXPERTS * RANK, 128),
        (64, EXPERTS * RANK),
    }


def test_names_of_linear_modules_and_of_experts_mix(mixtral_settings: ModelSettings) -> None:
    model = add_adapter(
        load_model(mixtral_settings, CPU), rmu_of(modules=["q_proj", "down_proj"]), mixtral_settings
    )
    places = {name.split(".layers.")[1].split(".lora")[0] for name in adapter_weights(model)}
    assert places == {
        f"{layer}.{module}" for layer in (1, 3) for module in ("mlp.experts", "self_attn.q_proj")
    }


def merged_by_hand(model: PeftModel, settings: ModelSettings) -> nn.Module:
    """A plain model in float32 of what the 4-bit one stands for: dequantised, and W + B A in every expert."""
    plain = AutoModelForCausalLM.from_pretrained(settings.name, dtype=torch.float32).requires_grad_(False)
    with base_only(model), torch.no_grad():
        for one, other in zip(decoder_layers(plain), decoder_layers(model), strict=True):
            wrapped = other.mlp.experts
            for name, shape in expert_shapes(one).items():
                leaf = name.rpartition(".")[2]
                one.mlp.experts.get_parameter(leaf).copy_(
                    getattr(getattr(wrapped, "base_layer", wrapped), leaf).view(shape)
                )
            for name, module in other.named_modules():
                if isinstance(module, Linear4bit):
                    one.get_submodule(name).weight.copy_(
                        dequantize_4bit(module.weight.data, module.weight.quant_state)
                    )
            if hasattr(wrapped, "lora_A"):
                for expert, (a, b) in enumerate(expert_factors(wrapped)):
                    one.mlp.experts.down_proj[expert] += b @ a
    return plain


def expert_factors(adapter: Any) -> list[tuple[Tensor, Tensor]]:
    """A `(rank, in)` and B `(out, rank)` of every expert, as PEFT lays them out: A expert by expert, B rank by rank."""
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    return [(a[expert * RANK : (expert + 1) * RANK], b[:, expert::EXPERTS]) for expert in range(EXPERTS)]


def test_outputs_and_gradients_are_those_of_the_merged_weights(
    model: PeftModel, mixtral_settings: ModelSettings
) -> None:
    plain = merged_by_hand(model, mixtral_settings)
    assert torch.allclose(activations(model), activations(plain), rtol=1e-4, atol=1e-4)
    for index in (1, 3):
        decoder_layers(plain)[index].mlp.experts.down_proj.requires_grad_(True)
    gradients(model)
    gradients(plain)
    for index in (1, 3):
        adapter = decoder_layers(model)[index].mlp.experts
        whole = decoder_layers(plain)[index].mlp.experts.down_proj.grad
        for expert, (a, b) in enumerate(expert_factors(adapter)):
            for_a, for_b = adapter.lora_A["default"].weight.grad, adapter.lora_B["default"].weight.grad
            assert torch.allclose(
                for_a[expert * RANK : (expert + 1) * RANK], b.T @ whole[expert], rtol=1e-3, atol=1e-5
            )
            assert torch.allclose(for_b[:, expert::EXPERTS], whole[expert] @ a.T, rtol=1e-3, atol=1e-5)
            assert for_a.any()
            assert for_b.any()


def test_many_passes_leave_nothing_behind(model: PeftModel, mixtral_settings: ModelSettings) -> None:
    """Trap 13: PEFT's own way of taking its parametrisation off leaves it there when the weight has another one."""
    base = activations(load_model(mixtral_settings, CPU))
    updated, learned = activations(model).detach(), gradients(model)
    assert not torch.allclose(updated, base, atol=0.1)
    packed = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }
    for turn in range(12):
        again = gradients(model, activation_checkpointing=turn % 2 == 1)
        assert again.keys() == learned.keys()
        assert all(torch.equal(again[name], learned[name]) for name in learned)
        with base_only(model), torch.no_grad():
            assert torch.equal(activations(model), base)
    assert torch.equal(activations(model), updated)
    parametrised = [module for module in model.modules() if parametrize.is_parametrized(module)]
    assert len(parametrised) == 6
    assert {len(each) for module in parametrised for each in module.parametrizations.values()} == {1}
    assert parametrize._cache == {}
    assert parametrize._cache_enabled == 0
    assert all(
        torch.equal(parameter, packed[name]) for name, parameter in model.named_parameters() if name in packed
    )


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("layers", [None, 4], ids=["whole", "cut"])
def test_a_saved_adapter_on_experts_gives_the_same_on_the_whole_model(
    mixtral_settings: ModelSettings, tmp_path: Path, quantisation: str, layers: int | None
) -> None:
    settings = mixtral_settings.model_copy(update={"quantisation": quantisation})
    trained = add_adapter(load_model(settings, CPU, layers), rmu_of(), settings)
    train_a_little(trained)
    save_adapter(trained, tmp_path)
    loaded = load_adapter(load_model(settings, CPU), tmp_path)
    for _ in range(3):
        assert torch.equal(activations(loaded), activations(trained))
    assert {path.name for path in tmp_path.iterdir()} - {"README.md"} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_plain_peft_puts_an_adapter_learned_in_4_bit_on_the_unquantised_model(
    model: PeftModel, mixtral_settings: ModelSettings, tmp_path: Path
) -> None:
    save_adapter(model, tmp_path)
    full = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(mixtral_settings.name, dtype=torch.float32), tmp_path
    )
    settings = mixtral_settings.model_copy(update={"quantisation": "none"})
    same = add_adapter(load_model(settings, CPU), rmu_of(), settings)
    same.load_state_dict(adapter_weights(model), strict=False)
    assert torch.equal(activations(full), activations(same))
    with base_only(full):
        assert not torch.allclose(activations(full), activations(same), atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules": ["down_prj"]},
            'rmu.modules names "down_prj", which no adapter layer has. Did you mean "down_proj"',
        ),
        ({"modules": ["w2"]}, "There is: down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj."),
        (
            {"modules": ["gate_up_proj", "down_proj"]},
            "rmu.modules names down_proj and gate_up_proj of the same experts",
        ),
        (
            {"trainable": "weights"},
            "The experts' down_proj cannot be trained itself: set rmu.trainable=lora.",
        ),
    ],
)
def test_what_experts_cannot_have_is_said(
    mixtral_settings: ModelSettings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        check_modules(load_model(mixtral_settings, CPU), rmu_of(**changes))
    assert message in str(raised.value)
