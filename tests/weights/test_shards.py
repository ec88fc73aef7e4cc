"""Which files of a checkpoint are needed, found in a folder or in the Hub's cache, and how a broken one is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError, hub_errors
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.weights.shards import find_files, is_needed, needed_files, open_weights

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 3)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sharded(small_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in shards of about half a layer."""
    folder = shutil.copytree(small_model_folder, tmp_path_factory.mktemp("shards") / "model")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(small_model_folder).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 6
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return shutil.copytree(sharded, tmp_path / "model")


def settings_of(folder: Path, quantisation: str = "none") -> ModelSettings:
    return ModelSettings.model_validate(
        {"name": str(folder), "quantisation": quantisation, "dtype": "float32"}
    )


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    ("name", "layers", "needed"),
    [
        ("model.embed_tokens.weight", 1, True),
        ("model.layers.0.mlp.down_proj.weight", 1, True),
        ("model.layers.1.mlp.down_proj.weight", 1, False),
        ("model.layers.10.self_attn.q_proj.bias", 2, False),
        ("model.layers.1.input_layernorm.weight", 2, True),
        ("model.layers.7.block_sparse_moe.experts.3.w2.weight", 8, True),
        ("model.layers.8.block_sparse_moe.gate.weight", 8, False),
        ("gpt_neox.layers.3.attention.query_key_value.weight", 3, False),
        ("transformer.h.7.mlp.c_proj.weight", 8, True),
        ("transformer.h.8.mlp.c_proj.weight", 8, False),
        ("transformer.blocks.8.ffn.down_proj.weight", 8, False),
        ("transformer.ln_f.bias", 8, False),
        ("layers.2.norm.weight", 3, True),
        ("model.embeddings.norm.weight", 3, True),
        ("embeddings.norm.weight", 3, True),
        ("model.unheard_of.weight", 3, True),
        ("model.norm.weight", 3, False),
        ("lm_head.weight", 3, False),
        ("lm_head.bias", 3, False),
        ("gpt_neox.final_layer_norm.bias", 3, False),
        ("embed_out.weight", 3, False),
    ],
)
def test_a_cut_model_needs_what_lies_below_its_cut(name: str, layers: int, needed: bool) -> None:
    assert is_needed(name, layers) is needed
    assert is_needed(name, None)


def test_files_are_those_that_hold_what_is_needed() -> None:
    index = {
        "lm_head.weight": "c",
        "model.embed_tokens.weight": "a",
        "model.layers.0.x": "a",
        "model.layers.1.x": "b",
        "model.norm.weight": "b",
    }
    assert needed_files(index, 1) == ["a"]
    assert needed_files(index, 2) == ["a", "b"]
    assert needed_files(index, None) == ["a", "b", "c"]


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_first_layers_load_from_their_shards_alone(
    sharded: Path, copied: Path, quantisation: str
) -> None:
    kept = needed_files(weight_map(copied), 3)
    for shard in copied.glob("*.safetensors"):
        if shard.name not in kept:
            shard.unlink()
    assert 0 < len(list(copied.glob("*.safetensors"))) < len(list(sharded.glob("*.safetensors"))) - 3
    cut, whole = (
        load_model(settings_of(copied, quantisation), CPU, layers=3),
        load_model(settings_of(sharded, quantisation), CPU),
    )
    outputs = [run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED) for model in (cut, whole)]
    assert torch.equal(*outputs)
    assert not any(parameter.is_meta for parameter in cut.parameters())


def test_a_model_in_shards_is_the_model_in_one_file(sharded: Path, small_settings: ModelSettings) -> None:
    assert torch.equal(
        load_model(settings_of(sharded), CPU)(IDS).logits, load_model(small_settings, CPU)(IDS).logits
    )


@pytest.mark.parametrize("layers", [None, 3])
def test_a_missing_shard_is_named(copied: Path, layers: int | None) -> None:
    shard = weight_map(copied)["model.layers.2.mlp.down_proj.weight"]
    (copied / shard).unlink()
    with pytest.raises(UserError) as raised:
        load_model(settings_of(copied), CPU, layers)
    assert (
        str(raised.value)
        == f"The checkpoint {copied} lacks {shard}, which its index names.\nDownload or copy it again."
    )


def test_a_damaged_shard_is_named(copied: Path) -> None:
    shard = copied / weight_map(copied)["model.layers.2.mlp.down_proj.weight"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard} is damaged or cut short: .*\nDownload or copy it again"):
        load_model(settings_of(copied), CPU)
    load_model(settings_of(copied), CPU, layers=1)  # which needs nothing of it


@pytest.mark.parametrize("content", ["", '{"metadata": {}}', "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(copied: Path, content: str) -> None:
    index = copied / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(UserError, match=f"index {index} is damaged or cut short"):
        load_model(settings_of(copied), CPU)


def test_weights_are_the_files_own_and_only_those_needed(sharded: Path) -> None:
    files = find_files(str(sharded), "main", 2)
    with open_weights(files, 2) as weights:
        read = {name: weight[...] for name, weight in weights.items()}
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"0", "1"}
    assert read.keys() == {name for name in weight_map(sharded) if is_needed(name, 2)}
    stored = {name: weight for file in files for name, weight in load_file(file).items()}
    assert all(torch.equal(weight, stored[name]) for name, weight in read.items())


@pytest.fixture
def cache(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache without a network, as an earlier download of `owner/name` has left it; gives the snapshot's folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub/models--owner--name/refs").mkdir(parents=True)
    (tmp_path / "hub/models--owner--name/refs/main").write_text(COMMIT)
    return shutil.copytree(sharded, tmp_path / "hub/models--owner--name/snapshots" / COMMIT)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_of_a_cached_model_only_the_needed_files_are_asked_for(cache: Path, revision: str) -> None:
    kept = needed_files(weight_map(cache), 3)
    assert find_files("owner/name", revision, None) == sorted(cache.glob("*.safetensors"))
    for shard in cache.glob("*.safetensors"):
        if shard.name not in kept:
            shard.unlink()
    assert find_files("owner/name", revision, 3) == [cache / name for name in kept]


def test_a_cached_model_in_one_file_is_found(cache: Path, small_model_folder: Path) -> None:
    (cache / "model.safetensors.index.json").unlink()
    shutil.copy(small_model_folder / "model.safetensors", cache)
    assert find_files("owner/name", "main", 3) == [cache / "model.safetensors"]


@pytest.mark.parametrize("gone", ["model.safetensors.index.json", "a shard"])
def test_what_is_neither_cached_nor_reachable_is_told_in_words(cache: Path, gone: str) -> None:
    (
        cache / (gone if gone.endswith("json") else weight_map(cache)["model.layers.0.mlp.up_proj.weight"])
    ).unlink()
    with (
        pytest.raises(UserError, match="owner/name is not on this machine and the Hub cannot be reached"),
        hub_errors("model", "owner/name"),
    ):
        find_files("owner/name", "main", 3)


def test_shards_without_their_index_are_named_with_what_is_missing(copied: Path) -> None:
    (copied / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError) as raised:
        load_model(settings_of(copied), CPU)
    there = sorted(path.name for path in copied.glob("*.safetensors"))
    first, advice = str(raised.value).splitlines()
    assert first == (
        f"The model folder {copied} holds {', '.join(there[:3])} and {len(there) - 3} more, but no model.safetensors.index.json,"
        " which says which weights lie in which file."
    )
    assert advice.startswith("Download model.safetensors.index.json")


def test_of_a_cached_model_without_its_index_the_same_is_said(cache: Path) -> None:
    """Unless the rest of it could still be downloaded: then the network is what is missing."""
    (cache / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="owner/name is not on this machine and the Hub cannot be reached"):
        find_files("owner/name", None, None)


@pytest.mark.parametrize(
    "place",
    [
        "../other/model.safetensors",
        "sub/model.safetensors",
        "/etc/model.safetensors",
        "..\\model.safetensors",
        "..",
    ],
)
def test_an_index_that_leaves_its_folder_is_refused(copied: Path, place: str) -> None:
    index = copied / "model.safetensors.index.json"
    weights = {name: place if "lm_head" in name else file for name, file in weight_map(copied).items()}
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError) as raised:
        find_files(str(copied), None, None)
    assert str(raised.value).startswith(
        f"The checkpoint's index {index} names {place}, which is not in its folder.\n"
    )


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "a shard"])
def test_a_git_lfs_pointer_is_told_as_one(copied: Path, name: str) -> None:
    file = copied / (name if name.endswith("json") else weight_map(copied)["lm_head.weight"])
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3456789\n")
    with pytest.raises(
        UserError,
        match=rf"{file} is a Git LFS pointer \(\d+ bytes\) and not the file itself\.\nFetch the files with `git lfs pull`",
    ):
        load_model(settings_of(copied), CPU)
