"""What a run made of its checkpoint, and every reason why that inconclusive."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.export.merge.update import update_of
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain

MakeRun = Callable[..., RunFolder]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(small_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return shutil.copytree(small_model_folder, tmp_path / "model")


@pytest.fixture
def run(model: Path, make_run: MakeRun) -> RunFolder:
    return make_run(model)


def said(run: RunFolder) -> str:
    """What `update_of` refuses with; an export then leaves nothing."""
    with pytest.raises(UserError) as raised:
        update_of(run)
    to = run.path.parent / "merged"
    with pytest.raises(UserError):
        merge(run, to)
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]
    return plain(raised.value, run=run.path, model=run.config["settings"]["model"]["name"])


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_merged_gives_a_new_tensor_of_the_same_shape_and_dtype(run: RunFolder) -> None:
    update = update_of(run)
    assert update.checked
    stored = update.tensors[DOWN].whole().bfloat16()
    before = stored.clone()
    merged = update.merged(DOWN, stored)
    assert (merged.shape, merged.dtype) == (stored.shape, torch.bfloat16)
    assert torch.equal(stored, before)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.1.mlp.down_proj.lora_{factor}.weight"] for factor in "AB")
    assert torch.equal(merged, (stored.float() + 1.5 * (b @ a)).bfloat16())
    assert torch.equal(update.merged(DOWN, stored[5:9], 5)[1:], merged[6:9])


def test_a_run_without_an_adapter(run: RunFolder) -> None:
    shutil.rmtree(run.adapter)
    assert said(run) == snapshot(
        "Run <run> has no adapter yet.\nGo on with it until it has unlearned: --resume --name made"
    )


def test_another_base_checkpoint_is_told_by_its_adapted_matrices(run: RunFolder, model: Path) -> None:
    edit_weights(model / "model.safetensors", lambda weights: weights[DOWN][3, 5].add_(1e-3))
    assert said(run) == snapshot(
        "The checkpoint <model> is not the one that <run> was made with: model.layers.1.mlp.down_proj.weight "
        "differs.\n"
        "Put back the files of then, or run again with those of now."
    )
    edit_weights(
        model / "model.safetensors", lambda weights: weights["model.layers.3.self_attn.q_proj.weight"].neg_()
    )
    assert said(run) == snapshot(
        "The checkpoint <model> is not the one that <run> was made with: model.layers.1.mlp.down_proj.weight "
        "differs, and 1 more.\n"
        "Put back the files of then, or run again with those of now."
    )


def test_other_tensors_may_change(run: RunFolder, model: Path) -> None:
    """Such as embeddings that were made longer: the update is no other for it."""
    edit_weights(model / "model.safetensors", lambda weights: weights["lm_head.weight"].neg_())
    assert update_of(run).checked


def test_a_run_that_recorded_no_matrices_is_not_checked_and_says_so(run: RunFolder, model: Path) -> None:
    run.matrices.unlink()
    edit_weights(model / "model.safetensors", lambda weights: weights[DOWN].neg_())
    assert not update_of(run).checked


def test_shapes_that_do_not_fit(run: RunFolder, model: Path) -> None:
    edit_weights(model / "model.safetensors", lambda weights: weights.update({DOWN: torch.zeros(64, 96)}))
    assert said(run) == snapshot(
        "The adapter does not fit the checkpoint <model>: it changes model.layers.1.mlp.down_proj.weight as "
        "a matrix of 64 x 128, but there it is 64 x 96.\n"
        "Give back the model that the run was made with."
    )


def test_a_tensor_that_the_checkpoint_does_not_have(run: RunFolder, model: Path) -> None:
    edit_weights(model / "model.safetensors", lambda weights: weights.pop(DOWN))
    assert said(run) == snapshot(
        "The checkpoint <model> has no tensor of its own for model.layers.1.mlp.down_proj.weight, which the "
        "adapter <run>/adapter changes.\n"
        "Is it still the model that the run was made with? If it is, export the adapter: --format adapter."
    )


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_checkpoint_that_is_quantised_already(run: RunFolder, model: Path, method: str) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert plain(said(run), method=method) == snapshot(
        "The model <model> is quantised already (<method>): nothing can be added to its weights.\n"
        "Put back the original checkpoint."
    )


def test_a_matrix_in_a_dtype_that_nothing_can_be_added_to(run: RunFolder, model: Path) -> None:
    run.matrices.unlink()
    edit_weights(
        model / "model.safetensors",
        lambda weights: weights.update({DOWN: weights[DOWN].to(torch.float8_e4m3fn)}),
    )
    with pytest.raises(UserError) as raised:
        merge(run, run.path.parent / "merged")
    assert plain(raised.value, model=model) == snapshot(
        "The checkpoint <model> is quantised already, or of a rare kind: model.layers.1.mlp.down_proj.weight "
        "is stored as F8_E4M3.\n"
        "Give the original checkpoint, in float32, float16 or bfloat16."
    )
    assert not (run.path.parent / "merged").exists()


def test_a_checkpoint_of_pickles_alone(run: RunFolder, model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert said(run) == snapshot(
        "The model folder <model> holds no *.safetensors file, only pytorch_model.bin.\n"
        "Other formats are not read: pickled weights can run code."
    )


def test_a_model_folder_that_is_gone(run: RunFolder, model: Path) -> None:
    shutil.rmtree(model)
    assert said(run) == snapshot(
        "The model folder <model> does not exist.\nPut back the model that the run was made with."
    )


def test_a_file_that_was_cut_short(run: RunFolder, model: Path) -> None:
    os.truncate(model / "model.safetensors", 5000)
    message = said(run)
    reason = message.splitlines()[0].partition(": ")[2].removesuffix(".")  # the words of safetensors
    assert plain(message, reason=reason) == snapshot(
        "The checkpoint's file <model>/model.safetensors is damaged or cut short: <reason>.\n"
        "Download or copy it again."
    )


def test_a_hub_model_that_is_neither_cached_nor_reachable(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = run.config["settings"]
    edit_json(
        run.path / "config.json",
        settings=settings | {"model": settings["model"] | {"name": "owner/name"}},
        model_revision="a" * 40,
    )
    assert said(run) == snapshot(
        "The model <model> is not on this machine and the Hub cannot be reached.\n"
        "Put back the model that the run was made with."
    )


def test_an_adapter_of_another_kind(run: RunFolder) -> None:
    edit_json(run.adapter / "adapter_config.json", use_dora=True)
    assert said(run) == snapshot(
        "The adapter <run>/adapter is no plain LoRA (use_dora), so it cannot be merged here.\n"
        "Load it with PEFT instead."
    )
    edit_json(run.adapter / "adapter_config.json", use_dora=False, peft_type="IA3")
    assert said(run) == snapshot(
        "The adapter <run>/adapter is no plain LoRA (IA3), so it cannot be merged here.\n"
        "Load it with PEFT instead."
    )


def test_an_index_that_names_files_of_several_folders(
    small_model_folder: Path, make_run: MakeRun, stored_as: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(stored_as(small_model_folder, torch.float32, "100KB"), tmp_path / "model")
    run = make_run(ModelSettings(name=str(model), quantisation="none", dtype="float32"))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    moved = index["weight_map"]["lm_head.weight"]
    (model / moved).rename(tmp_path / moved)
    index["weight_map"] = {
        name: f"../{moved}" if file == moved else file for name, file in index["weight_map"].items()
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        merge(run, tmp_path / "merged")
    assert plain(caught.value, model=model, moved=moved) == snapshot(
        "The checkpoint's index <model>/model.safetensors.index.json names ../<moved>, which is not in its "
        "folder.\n"
        "The files of a checkpoint lie together, next to the index: copy them there and correct the index."
    )
    assert not (tmp_path / "merged").exists()


def test_an_update_that_is_not_finite(run: RunFolder) -> None:
    edit_weights(
        run.adapter / "adapter_model.safetensors",
        lambda weights: [tensor.fill_(1e30) for tensor in weights.values()],
    )
    with pytest.raises(UserError) as raised:
        merge(run, run.path.parent / "merged")
    assert plain(raised.value) == snapshot(
        "With the update model.layers.1.mlp.down_proj.weight holds values that are not finite in float32: "
        "the run failed."
    )
    assert not (run.path.parent / "merged").exists()
