"""4-bit weights of linear modules and of fused experts, made while a checkpoint is loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.model import quantization as quantisation
from lowmem_rmu.model.experts import expert_shapes
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import describe_weights, load_model
from lowmem_rmu.model.quantization import quantise

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 3)
SHAPES = {"mlp.experts.gate_up_proj": (4, 256, 64), "mlp.experts.down_proj": (4, 64, 128)}


@pytest.fixture
def plain_settings(mixtral_settings: ModelSettings) -> ModelSettings:
    return mixtral_settings.model_copy(update={"quantisation": "none"})


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("layers", [None, 3])
def test_experts_are_found_in_4_bit_or_not(
    mixtral_settings: ModelSettings, quantisation: str, layers: int | None
) -> None:
    model = load_model(mixtral_settings.model_copy(update={"quantisation": quantisation}), CPU, layers)
    assert [expert_shapes(layer) for layer in decoder_layers(model)] == [SHAPES] * (layers or 6)


def test_a_model_without_experts_has_none(small_settings: ModelSettings) -> None:
    assert expert_shapes(decoder_layers(load_model(small_settings, CPU))[0]) == {}


def test_weights_are_quantised_as_bitsandbytes_quantises_the_same_matrices(
    mixtral_settings: ModelSettings, plain_settings: ModelSettings
) -> None:
    nf4, plain = load_model(mixtral_settings, CPU), load_model(plain_settings, CPU)
    for one, other in zip(decoder_layers(nf4), decoder_layers(plain), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            packed, state = quantize_4bit(
                getattr(other.mlp.experts, name).data, compress_statistics=True, quant_type="nf4"
            )
            assert torch.equal(getattr(one.mlp.experts, name), dequantize_4bit(packed, state))
            assert one.mlp.experts.parametrizations[name].original.dtype == torch.uint8
            assert one.mlp.experts.parametrizations[name].original.numel() * 2 == state.shape.numel()
        packed, state = quantize_4bit(
            other.self_attn.o_proj.weight.data, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(one.self_attn.o_proj.weight.data, packed)
        assert one.self_attn.o_proj.weight.quant_state == one.self_attn.o_proj.quant_state == state


@pytest.mark.parametrize("shape", [(64, 128), (4, 24, 64), (3, 10, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_in_pieces_is_quantising_at_once(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "PIECE", 1024)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantise(weight)
    expected, expected_state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed, expected)
    ours, theirs = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_almost_all_of_a_mixture_is_in_4_bit_and_counted(
    mixtral_settings: ModelSettings, plain_settings: ModelSettings
) -> None:
    """Trap 13: transformers' own 4-bit loader leaves the experts as they are."""
    plain = load_model(plain_settings, CPU)
    weights = sum(parameter.numel() for parameter in plain.parameters())
    linear = sum(
        module.weight.numel() for module in decoder_layers(plain).modules() if isinstance(module, nn.Linear)
    )
    experts = 6 * 4 * (256 * 64 + 64 * 128)
    assert describe_weights(plain) == {"weights": weights, "in_4bit": 0}
    assert describe_weights(load_model(mixtral_settings, CPU)) == {
        "weights": weights,
        "in_4bit": linear + experts,
    }


def test_the_first_layers_of_a_mixture_have_the_same_activations(mixtral_settings: ModelSettings) -> None:
    cut, whole = load_model(mixtral_settings, CPU, layers=3), load_model(mixtral_settings, CPU)
    outputs = [run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED) for model in (cut, whole)]
    assert torch.equal(*outputs)


def test_what_is_dequantised_goes_after_the_pass(mixtral_settings: ModelSettings) -> None:
    model = load_model(mixtral_settings, CPU)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert parametrize._cache == {}
    assert parametrize._cache_enabled == 0
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_weights_are_quantised_one_after_the_other(
    mixtral_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is not yet quantised has not been read either: it lies on the meta device."""
    own, plain_at_once = quantisation.put_in_4_bit, []

    def counted(module: nn.Module, name: str, weight: torch.Tensor) -> None:
        own(module, name, weight)
        plain_at_once.append(
            sum(each.is_floating_point() and not each.is_meta for each in module.parameters())
        )

    monkeypatch.setattr(quantisation, "put_in_4_bit", counted)
    load_model(mixtral_settings, CPU)
    assert plain_at_once == [0] * 6 * (4 + 2)  # four linear modules and two fused weights a layer


def test_nothing_is_dequantised_while_a_model_is_loaded(
    mixtral_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Bnb4bitParametrization, "forward", lambda *_: pytest.fail("a whole layer's experts were dequantised")
    )
    load_model(mixtral_settings, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_modules_and_experts_are_dequantised_to_the_models_type(
    mixtral_settings: ModelSettings, dtype: str
) -> None:
    model = load_model(mixtral_settings.model_copy(update={"dtype": dtype}), CPU)
    expected = getattr(torch, dtype)
    assert decoder_layers(model)[0].mlp.experts.down_proj.dtype == expected
    assert {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)} == {
        expected
    }
    assert {
        module.quant_state.dtype for module in model.modules() if isinstance(module, Bnb4bitParametrization)
    } == {expected}
    assert model(IDS).logits.dtype == expected


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_mixture_that_lacks_an_expert_is_incomplete(
    small_mixtral_folder: Path, mixtral_settings: ModelSettings, tmp_path: Path, quantisation: str
) -> None:
    folder = shutil.copytree(small_mixtral_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = mixtral_settings.model_copy(update={"name": str(folder), "quantisation": quantisation})
    with pytest.raises(
        UserError, match=r"lacks 1 weights, model\.layers\.2\.mlp\.experts\.down_proj among them"
    ):
        load_model(settings, CPU)
    load_model(settings, CPU, layers=2)


def test_matrices_that_gpt_2_stores_the_other_way_round_are_the_same_in_4_bit(tmp_path: Path) -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path), quantisation="nf4", dtype="float32")
    nf4: Any = load_model(settings, CPU)
    plain: Any = load_model(settings.model_copy(update={"quantisation": "none"}), CPU)
    entered = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    # The second is square: nothing but its values shows which way round it is.
    for name in (
        "c_attn",
        "c_proj",
    ):
        one, other = (getattr(model.transformer.h[1].attn, name) for model in (nf4, plain))
        expected = other(entered)
        assert isinstance(one, Linear4bit)
        assert 0.01 < (one(entered) - expected).norm() / expected.norm() < 0.15
