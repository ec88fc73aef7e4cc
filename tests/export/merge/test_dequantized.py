"""What `--base dequantised` merges into is what the run in 4-bit was trained on, to the bit."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from inline_snapshot import snapshot
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.merge.streamed import merge, update_of
from lowmem_rmu.model.adapters import load_adapter, trained_modules
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.weights import stored
from tests.texts import plain

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
MakeRun = Callable[..., RunFolder]
Store = Callable[..., Path]


def nf4(model: Path, dtype: str = "float32") -> ModelSettings:
    return ModelSettings.model_validate({"name": str(model), "quantisation": "nf4", "dtype": dtype})


def dequantised_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Of a model in 4-bit, as its forward pass sees them."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    found = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in linear.items()
    }
    for name, module in model.named_modules():
        if isinstance(module, Bnb4bitParametrization):
            place = name.replace("parametrizations.", "").rpartition(".")[0]
            found[place] = attrgetter(place)(model).view(module.quant_state.shape)
    return found


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pieces", [2**24, 2**13], ids=["whole", "in pieces"])
def test_all_that_was_4_bit_is_dequantised_and_the_update_added(
    small_model_folder: Path,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    pieces: int,
) -> None:
    monkeypatch.setattr(stored, "PIECE", pieces)
    run = make_run(nf4(small_model_folder, dtype), modules=["down_proj"])
    merge(run, tmp_path / "merged", base="dequantised")
    trained_on = dequantised_parameters(load_model(nf4(small_model_folder, dtype), CPU))
    assert update_of(run, "dequantised").adapted_names == trained_on.keys()
    ours, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", small_model_folder)
    )
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    for name, tensor in ours.items():
        expected = trained_on.get(name, original[name]).float()
        factor = f"base_model.model.{name.removesuffix('weight')}lora_{{}}.weight"
        if factor.format("A") in adapter:
            expected = expected + adapter[factor.format("B")] @ adapter[factor.format("A")] * 1.5
        assert torch.equal(tensor, expected), name


def test_experts_are_dequantised_as_they_were_quantised_together(
    small_mixtral_folder: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(nf4(small_mixtral_folder), modules=["q_proj"])
    merge(run, tmp_path / "merged", base="dequantised")
    trained_on = dequantised_parameters(load_model(nf4(small_mixtral_folder), CPU))
    ours = dict(loaded(tmp_path / "merged").named_parameters())
    experts = [name for name in trained_on if ".experts." in name]
    assert len(experts) == 12
    assert all(torch.equal(ours[name], trained_on[name]) for name in trained_on if "q_proj" not in name)


@pytest.mark.parametrize("trainable", ["lora", "weights"])
def test_the_merged_model_answers_as_the_run_did(
    small_model_folder: Path, make_run: MakeRun, tmp_path: Path, trainable: str
) -> None:
    settings = nf4(small_model_folder)
    run = make_run(settings, trainable=trainable)
    merge(run, tmp_path / "dequantised", base="dequantised")
    merge(run, tmp_path / "original")
    rmu = Rmu.model_validate(run.config["settings"]["rmu"])
    in_run = load_adapter(
        load_model(settings, CPU, None, trained_modules(loaded(small_model_folder), rmu)), run.adapter
    )(IDS).logits
    assert torch.allclose(loaded(tmp_path / "dequantised")(IDS).logits, in_run, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(loaded(tmp_path / "original")(IDS).logits, in_run, atol=0.1)


def test_biases_and_a_checkpoint_in_16_bits(
    make_run: MakeRun, stored_as: Store, save_random: Callable[[PretrainedConfig, Path], Path], tmp_path: Path
) -> None:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(vocab_size=1536, initializer_range=0.2, **shape)
    model = stored_as(save_random(config, tmp_path / "model"), torch.float16)
    run = make_run(nf4(model, "bfloat16"), modules=["q_proj"], trainable="weights")
    merge(run, tmp_path / "merged", base="dequantised")
    ours, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", model))
    trained = load_file(run.adapter / "adapter_model.safetensors")
    itself = [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 3)]
    trained_on = dequantised_parameters(load_model(nf4(model, "bfloat16"), CPU, None, itself))
    assert sum(name.endswith("q_proj.bias") for name in trained) == 2
    for name, tensor in ours.items():
        expected = trained.get(f"base_model.model.{name}", trained_on.get(name, original[name]))
        assert torch.equal(tensor, expected.half()), name
    assert len(update_of(run, "dequantised").adapted_names) == len(trained_on) + 4


def test_rows_in_the_middle_of_a_block_are_no_rows_of_the_dequantised(
    small_model_folder: Path, make_run: MakeRun
) -> None:
    update = update_of(make_run(nf4(small_model_folder)), "dequantised")
    name = "model.layers.2.self_attn.k_proj.weight"
    whole = update.merged(name, update.tensors[name].whole())
    assert torch.equal(update.merged(name, update.tensors[name].rows(3, 9), 3), whole[3:9])
    with pytest.raises(ValueError, match="row 1 of "):
        update.merged("model.layers.2.mlp.down_proj.weight", torch.zeros(4, 96), 1)


def test_a_run_that_was_not_in_4_bit_has_no_dequantised_weights(
    small_model_folder: Path, make_run: MakeRun
) -> None:
    run = make_run(small_model_folder)
    with pytest.raises(UserError) as caught:
        update_of(run, "dequantised")
    assert plain(caught.value, run=run.path) == snapshot(
        "Run <run> was not made in 4-bit: it trained on the original weights.\nLeave --base dequantised out."
    )


def test_experts_that_share_a_block_of_quantisation_are_refused(
    save_random: Callable[[PretrainedConfig, Path], Path], make_run: MakeRun, tmp_path: Path
) -> None:
    shape = {
        "hidden_size": 40,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = save_random(MixtralConfig(vocab_size=1536, num_local_experts=4, **shape), tmp_path / "model")
    run = make_run(nf4(model), modules=["q_proj"])
    with pytest.raises(UserError) as caught:
        merge(run, tmp_path / "merged", base="dequantised")
    assert plain(caught.value, model=model) == snapshot(
        "The experts of model.layers.0.mlp.experts.gate_up_proj share blocks of 64 weights when they are "
        "quantised.\n"
        "Leave --base dequantised out."
    )
    assert not (tmp_path / "merged").exists()
