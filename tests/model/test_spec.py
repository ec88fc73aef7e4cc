"""What is known of a model before its weights are loaded: each part is computed once, and none of them changes another."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model import spec as spec_module
from lowmem_rmu.model.adapters import trained_modules
from lowmem_rmu.model.layers import can_share_prefix, decoder_layers
from lowmem_rmu.model.loading import load_config, load_model, load_tokenizer
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.model.special_tokens import SpecialTokens
from tests.families import NO_4_BIT, Family

CPU = torch.device("cpu")
START, END = 1, 2
DENSE = Rmu(target_layer=3, adapter_layers=[1, 3], trainable="weights", modules=["down_proj"])
TRAINED = ("model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that read or build a part of a model, in the order of their calls."""
    names: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            names.append(name)
            return function(*arguments, **named)

        return call

    for name in (
        "load_config",
        "config_of_preset",
        "skeleton",
        "load_tokenizer",
        "count_weights",
        "load_model",
    ):
        function = counted(name, getattr(spec_module, name))
        for module in ("lowmem_rmu.model.spec", "lowmem_rmu.model.loading"):
            monkeypatch.setattr(f"{module}.{name}", function, raising=False)
    return names


def test_a_spec_reads_nothing_until_it_is_asked(calls: list[str]) -> None:
    spec = ModelSpec(ModelSettings(name="./nowhere"))
    assert (spec.name, calls) == ("./nowhere", [])
    for ask in (lambda: spec.config, lambda: spec.skeleton, lambda: spec.tokenizer, lambda: spec.load(CPU)):
        with pytest.raises(UserError, match="The model folder ./nowhere does not exist"):
            ask()


def test_whatever_a_run_asks_for_is_computed_once(small_settings: ModelSettings, calls: list[str]) -> None:
    spec = ModelSpec(small_settings, DENSE)
    for _ in range(2):
        spec.check_adapter()
        spec.check_checkpoint()
        assert spec.weights(DENSE.modules).layers == spec.layer_count == 6
        assert spec.trained_modules == TRAINED
        assert spec.special_tokens.prefix == spec.special_tokens.prefix
        spec.digest(CPU)
    model = spec.load(CPU)
    assert spec.tokenizer is spec.tokenizer
    assert len(model.state_dict()) == len(spec.skeleton.state_dict())
    assert sorted(calls) == ["count_weights", "load_config", "load_model", "load_tokenizer", "skeleton"]


def test_weights_are_counted_once_for_each_choice_of_modules(
    small_settings: ModelSettings, calls: list[str]
) -> None:
    spec = ModelSpec(small_settings)
    learning = [
        spec.weights(modules).learning(DENSE)
        for modules in (["down_proj"], ["up_proj", "down_proj"], ["down_proj"])
    ]
    assert learning == [2 * 64 * 128, 4 * 64 * 128, 2 * 64 * 128]
    assert calls.count("count_weights") == 2


def test_memory_of_a_hub_model_is_estimated_from_the_shape_in_the_preset(calls: list[str]) -> None:
    preset = load_preset("zephyr-7b")
    spec = ModelSpec.of_preset(preset)
    assert spec.weights(preset.rmu.modules).total() == pytest.approx(7.24e9, rel=0.01)
    assert spec.shape.num_hidden_layers == 32
    assert calls == ["config_of_preset", "skeleton", "count_weights"]


def test_memory_of_a_local_model_is_estimated_from_its_own_configuration(
    small_settings: ModelSettings,
) -> None:
    settings = small_settings.model_copy(update={"config": {"model_type": "gpt2"}})
    spec = ModelSpec(settings)
    assert spec.shape is spec.config
    assert spec.config.model_type == "mistral"


def test_every_family_is_known_without_its_weights(family: Family) -> None:
    spec, model = ModelSpec(family.settings), load_model(family.settings, CPU)
    assert {tensor.device.type for tensor in spec.skeleton.parameters()} == {"meta"}
    assert {name: tensor.shape for name, tensor in spec.skeleton.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert spec.layer_count == len(decoder_layers(model)) == 3
    assert spec.hidden_size == 32
    assert spec.can_share_prefix == can_share_prefix(model)


def test_asking_for_anything_else_leaves_the_digest_as_it_is(family: Family) -> None:
    rmu = Rmu(target_layer=2, adapter_layers=[1, 2], modules=[family.module], rank=2)
    spec = ModelSpec(family.settings, rmu)
    spec.check_adapter()
    spec.check_checkpoint()
    spec.load(CPU, layers=2)
    assert spec.config.to_diff_dict() == load_config(family.settings).to_diff_dict()
    assert not any("lora" in name for name, _ in spec.skeleton.named_modules())
    assert spec.digest(CPU) == ModelSpec(family.settings).digest(CPU)


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_trained_modules_are_loaded_unquantized(small_settings: ModelSettings, quantisation: str) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    model = ModelSpec(settings, DENSE).load(CPU)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    in_4_bit = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert in_4_bit == (linear.keys() - set(TRAINED) if quantisation == "nf4" else set())


def test_trained_modules_may_be_named(small_settings: ModelSettings) -> None:
    settings = small_settings.model_copy(update={"quantisation": "nf4"})
    model = ModelSpec(settings, trained=[TRAINED[0]]).load(CPU, layers=2)
    layers: Any = decoder_layers(model)
    assert len(layers) == 2
    assert isinstance(layers[0].mlp.down_proj, Linear4bit)
    assert not isinstance(layers[1].mlp.down_proj, Linear4bit)


@pytest.mark.parametrize("rmu", [None, Rmu(target_layer=3, adapter_layers=[1, 3])])
def test_with_lora_or_without_training_everything_is_quantized(
    small_settings: ModelSettings, rmu: Rmu | None
) -> None:
    assert ModelSpec(small_settings, rmu).trained_modules == ()
    assert trained_modules(ModelSpec(small_settings).skeleton, DENSE) == list(TRAINED)


def test_what_is_trained_and_the_precision_are_in_the_digest(small_settings: ModelSettings) -> None:
    spec = ModelSpec(small_settings)
    others = [
        ModelSpec(small_settings, DENSE),
        spec.with_precision(dtype="bfloat16"),
        spec.with_precision(quantisation="nf4"),
    ]
    assert len({each.digest(CPU) for each in (spec, *others)}) == 4
    assert ModelSpec(small_settings, DENSE).digest(CPU) == ModelSpec(
        small_settings, trained=TRAINED[::-1]
    ).digest(CPU)


def test_another_precision_reads_nothing_again(small_settings: ModelSettings, calls: list[str]) -> None:
    spec = ModelSpec(small_settings)
    plain = spec.load(CPU)
    changed = spec.with_precision(quantisation="nf4", dtype="bfloat16")
    model: Any = changed.load(CPU)
    assert (changed.dtype(CPU), spec.dtype(CPU), plain.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert isinstance(decoder_layers(model)[0].mlp.down_proj, Linear4bit)
    assert spec.settings == small_settings
    assert (calls.count("load_config"), calls.count("skeleton")) == (1, 1)


@pytest.mark.parametrize("family", NO_4_BIT, indirect=True)
def test_a_model_that_does_not_work_in_4_bit_is_refused_however_it_is_asked_for(family: Family) -> None:
    spec = ModelSpec(family.settings)
    for ask in (
        lambda: spec.load(CPU, quantisation="nf4"),
        lambda: spec.with_precision(quantisation="nf4").load(CPU),
        lambda: ModelSpec(family.settings.model_copy(update={"quantisation": "nf4"})).config,
    ):
        with pytest.raises(UserError, match="does not work in 4-bit"):
            ask()


def test_settings_that_the_model_does_not_allow_are_refused_without_its_weights(
    small_settings: ModelSettings, calls: list[str]
) -> None:
    with pytest.raises(UserError, match=r"rmu.target_layer is 9, but the model has 6 layers"):
        ModelSpec(small_settings, Rmu(target_layer=9, adapter_layers=[9])).check_adapter()
    with pytest.raises(UserError, match='rmu.modules names "down"'):
        ModelSpec(small_settings, Rmu(target_layer=3, adapter_layers=[3], modules=["down"])).check_adapter()
    ModelSpec(small_settings).check_adapter()
    assert "load_model" not in calls


def test_a_stored_head_that_config_json_ties_is_untied_in_the_checkpoint_alone(
    small_model_folder: Path, small_settings: ModelSettings, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    spec = ModelSpec(small_settings.model_copy(update={"name": str(folder)}))
    checkpoint = spec.checkpoint()
    assert (checkpoint.is_untied, checkpoint.config.tie_word_embeddings, spec.config.tie_word_embeddings) == (
        True,
        False,
        True,
    )
    model: Any = spec.load(CPU)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)

    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    same = spec.checkpoint()
    assert (same.is_untied, same.config.tie_word_embeddings) == (False, True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", SpecialTokens([], [])),
        ("<s> $A", SpecialTokens([START], [])),
        ("$A </s>", SpecialTokens([], [END])),
        ("<s> $A </s>", SpecialTokens([START], [END])),
    ],
)
def test_prefix_and_suffix_are_those_of_the_tokenizer_in_the_folder(
    template: str,
    expected: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
    small_model_folder: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(small_model_folder, tmp_path / "model"))
    other: Any = deepcopy(tokenizer)
    special = [("<s>", START), ("</s>", END)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    other.save_pretrained(folder)
    assert ModelSpec(ModelSettings(name=str(folder))).special_tokens == expected


def test_the_tokenizer_is_the_one_of_load_tokenizer(small_settings: ModelSettings) -> None:
    ours, plain = ModelSpec(small_settings).tokenizer, load_tokenizer(small_settings)
    assert ours.name_or_path == plain.name_or_path == small_settings.name
    assert ours.pad_token_id == plain.pad_token_id
    assert ours("The gate opens.")["input_ids"] == plain("The gate opens.")["input_ids"]
