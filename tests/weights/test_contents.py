"""Checkpoints that hold other things than config.json says: refused where the model would misread them, named where it leaves them out."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Evaluation, ModelSettings
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.inputs import read_inputs
from lowmem_rmu.measure import find_subject, measure
from lowmem_rmu.model.loading import load_config, load_model, skeleton
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights.contents import places_of
from tests.export.conftest import save_run
from tests.texts import plain

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
Weights = dict[str, Tensor]


@pytest.fixture
def folder(small_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may damage."""
    return shutil.copytree(small_model_folder, tmp_path / "model")


def edit_weights(folder: Path, edit: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def settings_of(folder: Path, quantisation: str = "none") -> ModelSettings:
    return ModelSettings.model_validate(
        {"name": str(folder), "quantisation": quantisation, "dtype": "float32"}
    )


def fp8(weights: Weights) -> None:
    """As NVIDIA ModelOpt stores it: a scale for each matrix, and nothing about it in config.json."""
    scale = weights[DOWN].float().abs().max() / 448
    weights[DOWN] = (weights[DOWN].float() / scale).to(torch.float8_e4m3fn)
    weights[f"{DOWN}_scale"] = scale.reshape(1)


def int8(weights: Weights) -> None:
    weights[DOWN] = (weights[DOWN].float() * 10).to(torch.int8)


def scaled(weights: Weights) -> None:
    """Matrices in a dtype that is read, whose values mean nothing without their scale (as DeepSeek names it)."""
    weights[f"{DOWN}_scale_inv"] = torch.ones(1)


def constants(weights: Weights) -> None:
    """As bitsandbytes names them."""
    weights |= {f"{DOWN}.absmax": torch.ones(4), f"{DOWN}.quant_map": torch.ones(16)}


def bias(weights: Weights) -> None:
    """config.json says nothing of a bias, but there is one."""
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def adapter(weights: Weights) -> None:
    weights["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(4, 64)


MISREAD = {
    fp8: snapshot(
        "The checkpoint <folder> is quantised already, or of a rare kind: model.layers.1.mlp.down_proj.weight is stored as F8_E4M3.\n"
        "Give the original checkpoint, in float32, float16 or bfloat16."
    ),
    int8: snapshot(
        "The checkpoint <folder> is quantised already, or of a rare kind: model.layers.1.mlp.down_proj.weight is stored as I8.\n"
        "Give the original checkpoint, in float32, float16 or bfloat16."
    ),
    scaled: snapshot(
        "The checkpoint <folder> holds model.layers.1.mlp.down_proj.weight_scale_inv, which the model that its config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    ),
    constants: snapshot(
        "The checkpoint <folder> holds model.layers.1.mlp.down_proj.weight.absmax, model.layers.1.mlp.down_proj.weight.quant_map, which the model that its config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    ),
    bias: snapshot(
        "The checkpoint <folder> holds model.layers.0.self_attn.q_proj.bias, which the model that its config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    ),
    adapter: snapshot(
        "The checkpoint <folder> holds model.layers.0.self_attn.q_proj.lora_A.default.weight, which the model that its config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    ),
}


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("damage", MISREAD)
def test_what_would_be_misread_is_never_loaded(
    folder: Path, damage: Callable[[Weights], None], quantisation: str
) -> None:
    edit_weights(folder, damage)
    for load in (
        lambda settings: ModelSpec(settings).check_checkpoint(),
        lambda settings: load_model(settings, CPU),
        lambda settings: load_model(settings, CPU, layers=3),
    ):
        with pytest.raises(UserError) as raised:
            load(settings_of(folder, quantisation))
        assert plain(raised.value, folder=folder) == MISREAD[damage]


def test_layers_that_are_not_read_may_hold_anything(folder: Path) -> None:
    edit_weights(folder, fp8)
    load_model(settings_of(folder), CPU, layers=1)


def test_every_verb_says_it_before_any_work(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, fp8)
    with pytest.raises(UserError) as raised:
        measure(find_subject(str(folder)), Evaluation(), CPU, tmp_path / "evaluation", None, Distributed())
    assert plain(raised.value, folder=folder) == MISREAD[fp8]
    assert not (tmp_path / "evaluation").exists()
    preset = load_preset("tiny", [f"model.name={folder}", "rmu.target_layer=3", "rmu.adapter_layers=[1]"])
    with pytest.raises(UserError) as raised:
        read_inputs(preset, ModelSpec.of_preset(preset), ["unlearn"])
    assert plain(raised.value, folder=folder) == MISREAD[fp8]


@pytest.mark.parametrize("how", [scaled, fp8])
def test_a_merged_export_of_it_is_refused(
    folder: Path, make_run_of: Callable[[Path], Any], tmp_path: Path, how: Callable[[Weights], None]
) -> None:
    run = make_run_of(folder)
    edit_weights(folder, how)
    run.matrices.unlink()
    with pytest.raises(UserError) as raised:
        merge(run, tmp_path / "merged")
    assert plain(raised.value, folder=folder) == MISREAD[how]
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def make_run_of(tmp_path: Path) -> Callable[[Path], Any]:
    return lambda folder: save_run(tmp_path / "runs/made", settings_of(folder))


def test_experts_scales_are_found_next_to_the_fused_weights(
    small_mixtral_folder: Path, tmp_path: Path
) -> None:
    folder, name = (
        shutil.copytree(small_mixtral_folder, tmp_path / "model"),
        "model.layers.0.block_sparse_moe.experts.1.w2.weight_scale",
    )
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(1)}))
    with pytest.raises(UserError) as raised:
        ModelSpec(settings_of(folder)).check_checkpoint()
    assert plain(raised.value, folder=folder, tensor=name) == snapshot(
        "The checkpoint <folder> holds <tensor>, which the model that its config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    )


def test_what_the_model_does_not_have_is_named_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(64, 128) for layer in range(6, 11)}
    edit_weights(folder, lambda weights: weights.update(extra))
    with caplog.at_level(logging.WARNING):
        load_model(settings_of(folder), CPU)
    said = [record.getMessage() for record in caplog.records if record.name == "lowmem_rmu.weights.contents"]
    assert [plain(line, folder=folder) for line in said] == snapshot(
        [
            "The checkpoint <folder> holds model.layers.6.mlp.down_proj.weight, model.layers.7.mlp.down_proj.weight, model.layers.8.mlp.down_proj.weight and 2 more tensors, which the model does not have: left out."
        ]
    )


def test_constants_of_old_checkpoints_are_no_news(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(
        folder,
        lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    with caplog.at_level(logging.WARNING):
        ModelSpec(settings_of(folder)).check_checkpoint()
    assert "inv_freq" not in caplog.text


@pytest.mark.parametrize("fixture", ["small_model_folder", "small_mixtral_folder"])
def test_every_tensor_of_a_good_checkpoint_has_its_place(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    model = skeleton(load_config(settings_of(folder)))
    places = places_of(model, load_file(folder / "model.safetensors"))
    assert set(places.values()) == set(model.state_dict())


def tie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


IDS = torch.arange(5, 37).reshape(2, 16)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_stored_head_counts_though_config_json_calls_it_tied(
    small_model_folder: Path, folder: Path, quantisation: str
) -> None:
    tie(folder)
    model = load_model(settings_of(folder, quantisation), CPU)
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(
            model(IDS).logits, load_model(settings_of(small_model_folder, quantisation), CPU)(IDS).logits
        )


def test_a_head_that_is_stored_twice_stays_tied(folder: Path) -> None:
    tie(folder)
    edit_weights(
        folder,
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    model: Any = load_model(settings_of(folder), CPU)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merged_export_has_the_head_that_was_measured(
    small_model_folder: Path, folder: Path, make_run_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    tie(folder)
    merged = merge(make_run_of(folder), tmp_path / "merged")
    assert merged.untied
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True, (
        "the original's stays as it was"
    )
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(
        exported.lm_head.weight, load_file(small_model_folder / "model.safetensors")["lm_head.weight"]
    )


def test_a_merged_export_of_a_consistent_checkpoint_keeps_its_config(
    folder: Path, make_run_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    merged = merge(make_run_of(folder), tmp_path / "merged")
    assert not merged.untied
    assert (tmp_path / "merged/config.json").read_bytes() == (folder / "config.json").read_bytes()
