"""LoRA adapters: where they sit, what they leave alone, and that anyone's PEFT can load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, base_only, load_adapter, save_adapter, trained_modules
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import load_config, load_model, skeleton
from tests.families import Family

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 4)


def rmu_of(**changes: Any) -> Rmu:
    return Rmu(**{"target_layer": 3, "adapter_layers": [1, 3], "modules": ["down_proj"], "rank": 4} | changes)


@pytest.fixture(params=["lora", "weights"])
def rmu(request: pytest.FixtureRequest) -> Rmu:
    """Both ways of training: beside the matrices, or the matrices themselves."""
    return rmu_of(trainable=request.param)


@pytest.fixture
def model(small_settings: ModelSettings, rmu: Rmu) -> PeftModel:
    return add_adapter(load_model(small_settings, CPU), rmu, small_settings)


def load_for(settings: ModelSettings, rmu: Rmu, layers: int | None = None) -> PreTrainedModel:
    """As the pipeline loads it: matrices that are trained themselves are not quantised."""
    return load_model(settings, CPU, layers, trained_modules(load_model(settings, CPU), rmu))


def adapter_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }


def train_a_little(model: PeftModel) -> None:
    """Stands for training: the outputs move."""
    with torch.no_grad():
        for seed, parameter in enumerate(adapter_weights(model).values()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def activations(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_named_modules_of_named_layers_learn_and_do_so_in_float32(
    small_settings: ModelSettings, quantisation: str, dtype: str
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation, "dtype": dtype})
    model = add_adapter(load_model(settings, CPU), rmu_of(modules=["down_proj", "q_proj"]), settings)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    places = {name.split(".layers.")[1].rsplit(".", 3)[0] for name in learning}
    assert places == {
        f"{layer}.{module}" for layer in (1, 3) for module in ("mlp.down_proj", "self_attn.q_proj")
    }
    assert learning.keys() == adapter_weights(model).keys()
    assert len(learning) == 8
    assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    assert all(4 in parameter.shape for parameter in learning.values())


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_fresh_adapter_changes_nothing(small_settings: ModelSettings, rmu: Rmu, quantisation: str) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    model = load_for(settings, rmu)
    before = model(IDS).logits
    assert torch.equal(add_adapter(model, rmu, settings)(IDS).logits, before)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_matrices_learn_in_float32_and_the_rest_stays_as_it_is(
    small_settings: ModelSettings, quantisation: str, dtype: str
) -> None:
    settings, rmu = (
        small_settings.model_copy(update={"quantisation": quantisation, "dtype": dtype}),
        rmu_of(trainable="weights"),
    )
    model = add_adapter(load_for(settings, rmu), rmu, settings)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning.keys() == {
        f"base_model.model.model.layers.{index}.mlp.down_proj.modules_to_save.default.weight"
        for index in (1, 3)
    }
    assert {(parameter.dtype, tuple(parameter.shape)) for parameter in learning.values()} == {
        (torch.float32, (64, 128))
    }
    layers = decoder_layers(model)
    originals = {layers[index].mlp.down_proj.original_module.weight.dtype for index in (1, 3)}
    assert originals == {getattr(torch, dtype)}
    assert (
        isinstance(layers[2].mlp.down_proj, Linear4bit)
        == isinstance(layers[1].mlp.up_proj, Linear4bit)
        == (quantisation == "nf4")
    )
    assert model(IDS).logits.dtype == getattr(torch, dtype)


def test_trained_modules_are_those_of_the_named_layers() -> None:
    config = MistralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=10,
    )
    model = skeleton(config)
    assert trained_modules(
        model, rmu_of(trainable="weights", modules=["down_proj", "q_proj"], adapter_layers=[1])
    ) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert trained_modules(model, rmu_of()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_stay_frozen_and_of_their_type(small_settings: ModelSettings, dtype: torch.dtype) -> None:
    """Trap 4: what `prepare_model_for_kbit_training` does to them drags the backward pass through the lowest layers."""
    settings = small_settings.model_copy(
        update={"quantisation": "nf4", "dtype": str(dtype).removeprefix("torch.")}
    )
    model = add_adapter(load_model(settings, CPU), rmu_of(), settings)
    embeddings = model.get_input_embeddings()
    assert embeddings.weight.dtype == dtype
    assert not embeddings(IDS).requires_grad
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == adapter_weights(model).keys()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            ["down_proj", "down_prj"],
            'rmu.modules names "down_prj", which no adapter layer has. Did you mean "down_proj"',
        ),
        (["w2"], "There is: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."),
        (["lm_head"], 'names "lm_head", which no adapter layer has'),
    ],
)
def test_an_unknown_module_lists_those_there_are(
    small_settings: ModelSettings, modules: list[str], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        add_adapter(load_model(small_settings, CPU), rmu_of(modules=modules), small_settings)
    assert message in str(raised.value)


def test_a_target_layer_beyond_the_model_is_refused(small_settings: ModelSettings) -> None:
    with pytest.raises(
        UserError, match=r"rmu\.target_layer is 6, but the model has 6 layers: 0 to 5\.\n.*try 1\."
    ):
        add_adapter(load_model(small_settings, CPU), rmu_of(target_layer=6), small_settings)


def test_the_last_layer_can_be_the_target(small_settings: ModelSettings) -> None:
    add_adapter(load_model(small_settings, CPU), rmu_of(target_layer=5, adapter_layers=[5]), small_settings)


def test_the_seed_alone_decides_the_weights(small_settings: ModelSettings) -> None:
    weights = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = add_adapter(load_model(small_settings, CPU), rmu_of(seed=seed), small_settings)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append([parameter for name, parameter in adapter_weights(model).items() if "lora_A" in name])
    first, same, other = weights
    assert all(torch.equal(one, two) for one, two in zip(first, same, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize(("lora_alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_the_scale_is_lora_alpha_over_rank(
    small_settings: ModelSettings, lora_alpha: float | None, scale: float
) -> None:
    model = add_adapter(load_model(small_settings, CPU), rmu_of(lora_alpha=lora_alpha), small_settings)
    assert decoder_layers(model)[1].mlp.down_proj.scaling == {"default": scale}


@pytest.mark.parametrize("fails", [False, True], ids=["success", "exception"])
def test_base_only_switches_the_adapter_off_and_on_again(
    small_settings: ModelSettings, model: PeftModel, fails: bool
) -> None:
    base = load_model(small_settings, CPU)(IDS).logits
    train_a_little(model)
    unlearned = model(IDS).logits
    assert not torch.allclose(base, unlearned, atol=0.1)
    try:
        with base_only(model):
            assert torch.equal(model(IDS).logits, base)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(model(IDS).logits, unlearned)
    assert all(parameter.requires_grad for parameter in adapter_weights(model).values())


def test_base_only_takes_a_model_without_an_adapter(small_settings: ModelSettings) -> None:
    base = load_model(small_settings, CPU)
    with base_only(base):
        assert torch.isfinite(base(IDS).logits).all()


@pytest.mark.parametrize("layers", [None, 4], ids=["whole", "cut"])
def test_a_saved_adapter_loads_on_the_whole_model_by_plain_peft(
    small_settings: ModelSettings, tmp_path: Path, rmu: Rmu, layers: int | None
) -> None:
    trained = add_adapter(load_model(small_settings, CPU, layers=layers), rmu, small_settings)
    train_a_little(trained)
    save_adapter(trained, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"README.md"} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == small_settings.name
    )
    base = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)
    without = activations(base)
    whole = PeftModel.from_pretrained(base, tmp_path)
    assert len(decoder_layers(whole)) == 6
    assert len(adapter_weights(whole)) == (4 if rmu.trainable == "lora" else 2)
    assert torch.equal(activations(whole), activations(trained))
    assert not torch.allclose(activations(whole), without, atol=0.1)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_saved_adapter_is_loaded_frozen_or_to_learn_on(
    small_settings: ModelSettings, model: PeftModel, tmp_path: Path, trainable: bool
) -> None:
    train_a_little(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_model(small_settings, CPU), tmp_path, trainable=trainable)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {parameter.requires_grad for parameter in adapter_weights(loaded).values()} == {trainable}


def test_a_folder_without_an_adapter_says_what_to_run(small_settings: ModelSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter\.\nRun the unlearn stage first"):
        load_adapter(load_model(small_settings, CPU), tmp_path / "adapter")


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_a_conv1d_gets_low_rank_adapters_only(family: Family) -> None:
    model = skeleton(load_config(family.settings))
    with pytest.raises(
        UserError, match=r"c_proj is a Conv1D, which cannot be trained itself: set rmu\.trainable=lora"
    ):
        add_adapter(
            model,
            rmu_of(target_layer=2, adapter_layers=[1], modules=["c_proj"], trainable="weights"),
            family.settings,
        )


@pytest.mark.parametrize("family", ["mamba"], indirect=True)
def test_what_peft_refuses_is_said_before_work_begins(family: Family) -> None:
    model = skeleton(load_config(family.settings))
    with pytest.raises(
        UserError, match=r"PEFT puts no adapter on out_proj of this model: .*\nChoose others: rmu\.modules"
    ):
        add_adapter(model, rmu_of(target_layer=2, adapter_layers=[1], modules=["out_proj"]), family.settings)


@pytest.mark.parametrize("family", ["deepseek_v3"], indirect=True)
@pytest.mark.parametrize("adapter_layers", [[0], [0, 1]])
def test_adapters_that_peft_would_put_elsewhere_are_refused(
    family: Family, adapter_layers: list[int]
) -> None:
    """Layer 0 is dense: PEFT takes its down_proj for that of all experts."""
    model = skeleton(load_config(family.settings))
    with pytest.raises(
        UserError, match="PEFT puts the adapters for down_proj on layers .* instead of .*others have experts"
    ):
        add_adapter(model, rmu_of(target_layer=2, adapter_layers=adapter_layers), family.settings)
