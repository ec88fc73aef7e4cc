"""The merged checkpoint: equal to PEFT's own merge bit for bit, and to the original in every byte that the update does not touch."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, PretrainedConfig

from lowmem_rmu.chat.session import load_run
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.export.merge.streamed import Merged, merge, update_of
from lowmem_rmu.measure import find_subject
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.weights import stored
from lowmem_rmu.weights.stored import stored_tensors

TINY = Path(__file__).parents[3] / "lowmem_rmu/tiny/model"
IDS = torch.arange(5, 37).reshape(2, 16)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MakeRun = Callable[..., RunFolder]
Store = Callable[..., Path]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_by_peft(model: Path, run: RunFolder, dtype: torch.dtype, **how: Any) -> dict[str, Tensor]:
    """The tensors of the checkpoint that PEFT's way ends in: the whole model loaded unquantised, merged and saved."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    PeftModel.from_pretrained(base, run.adapter).merge_and_unload().save_pretrained(run.path / "peft", **how)
    return weights(run.path / "peft")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [
        name
        for name in ours
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    assert not different


def changed(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trainable", ["lora", "weights"])
@pytest.mark.parametrize("shards", ["10GB", "100KB"], ids=["one file", "shards"])
def test_it_is_pefts_own_merge_bit_for_bit(
    small_model_folder: Path,
    make_run: MakeRun,
    stored_as: Store,
    tmp_path: Path,
    dtype: torch.dtype,
    trainable: str,
    shards: str,
) -> None:
    model = stored_as(small_model_folder, dtype, shards)
    run = make_run(model, trainable=trainable)
    merge(run, tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert_equal(ours, merged_by_peft(model, run, dtype))
    adapted = {
        f"model.layers.{layer}.{module}.weight"
        for layer in (1, 3)
        for module in ("mlp.down_proj", "self_attn.q_proj")
    }
    assert changed(ours, weights(model)) == adapted == update_of(run).adapted_names


@pytest.mark.parametrize("trainable", ["lora", "weights"])
def test_rows_in_pieces_have_the_bits_of_the_whole(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    run = make_run(TINY, trainable=trainable, modules=["down_proj", "gate_proj"], rank=8)
    merge(run, tmp_path / "whole")
    monkeypatch.setattr(stored, "PIECE", 2**15)
    tensor = stored_tensors(TINY / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    assert list(tensor.pieces()) == [(first, first + 64) for first in range(0, 384, 64)]
    merge(run, tmp_path / "pieces")
    name = "model.safetensors"
    assert (
        (tmp_path / "pieces" / name).read_bytes()
        == (tmp_path / "whole" / name).read_bytes()
        != (TINY / name).read_bytes()
    )


@pytest.mark.parametrize("modules", [["down_proj", "q_proj"], ["gate_up_proj"]], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["experts apart", "experts fused"])
def test_experts_too(
    small_mixtral_folder: Path,
    make_run: MakeRun,
    stored_as: Store,
    tmp_path: Path,
    modules: list[str],
    fused: bool,
) -> None:
    model = stored_as(small_mixtral_folder, torch.float32, "200KB", save_original_format=not fused)
    run = make_run(model, modules=modules)
    merge(run, tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert_equal(ours, merged_by_peft(model, run, torch.float32, save_original_format=not fused))
    assert len(changed(ours, weights(model))) == (
        len(modules) * 2 if fused else {"down_proj": 10, "gate_up_proj": 16}[modules[0]]
    )


def test_experts_in_16_bits_are_rounded_once_where_peft_rounds_twice(
    small_mixtral_folder: Path, make_run: MakeRun, stored_as: Store, tmp_path: Path
) -> None:
    """PEFT rounds what it adds to experts to the model's dtype before it adds it."""
    model = stored_as(small_mixtral_folder, torch.bfloat16)
    run = make_run(model, modules=["down_proj"])
    merge(run, tmp_path / "merged")
    exact = merged_by_peft(stored_as(model, torch.float32), run, torch.float32)
    ours, theirs = weights(tmp_path / "merged"), merged_by_peft(model, run, torch.bfloat16)
    assert_equal(ours, {name: tensor.bfloat16() for name, tensor in exact.items()})
    adapted = changed(ours, weights(model))
    assert len(adapted) == 8
    for name in adapted:
        assert 0 < (ours[name].float() - exact[name]).norm() < (theirs[name].float() - exact[name]).norm()


def test_experts_that_are_stored_transposed(
    make_run: MakeRun, save_random: Callable[[PretrainedConfig, Path], Path], tmp_path: Path
) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 1536,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = GptOssConfig(
        **shape,
        intermediate_size=64,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = save_random(config, tmp_path / "model")
    run = make_run(model, modules=["down_proj"])
    merge(run, tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert_equal(ours, merged_by_peft(model, run, torch.float32))
    assert changed(ours, weights(model)) == {
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 3)
    }


def test_a_model_with_tied_embeddings_stays_one(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(TINY)
    merge(run, tmp_path / "merged")
    assert_equal(weights(tmp_path / "merged"), merged_by_peft(TINY, run, torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in weights(tmp_path / "merged")


def test_the_merged_model_answers_as_base_and_adapter_together_do(
    small_model_folder: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(small_model_folder)
    threads = torch.get_num_threads()
    merge(run, tmp_path / "merged")
    assert torch.get_num_threads() == threads
    base = AutoModelForCausalLM.from_pretrained(small_model_folder, dtype=torch.float32)
    before = base(IDS).logits
    together = PeftModel.from_pretrained(base, run.adapter)(IDS).logits
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert torch.allclose(model(IDS).logits, together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, before, atol=0.1)
    text = "What is a lock?"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == AutoTokenizer.from_pretrained(
        small_model_folder
    )(text)


@pytest.fixture
def sharded(small_model_folder: Path, stored_as: Store) -> Path:
    return stored_as(small_model_folder, torch.bfloat16, "100KB")


@pytest.mark.parametrize("link", [True, False], ids=["links", "copies"])
def test_shards_without_adapted_matrices_are_linked_or_copied(
    sharded: Path, make_run: MakeRun, tmp_path: Path, link: bool
) -> None:
    run = make_run(sharded)
    done = merge(run, tmp_path / "merged", link=link)
    holding = {
        stored.file.name
        for name, stored in update_of(run).tensors.items()
        if name in update_of(run).adapted_names
    }
    all_shards = {path.name for path in sharded.glob("*.safetensors")}
    assert done == Merged(4, sorted(holding), *sides(sorted(all_shards - holding), link), checked=True)
    assert 0 < len(holding) < len(all_shards)
    for name in all_shards:
        ours, theirs = tmp_path / "merged" / name, sharded / name
        assert os.path.samefile(ours, theirs) == (link and name not in holding)
        assert (ours.read_bytes() == theirs.read_bytes()) == (name not in holding)
        assert not ours.is_symlink()


def sides(kept: list[str], link: bool) -> tuple[list[str], list[str]]:
    return (kept, []) if link else ([], kept)


def test_in_a_rewritten_shard_only_the_matrices_bytes_differ(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(TINY)
    merge(run, tmp_path / "merged")
    ours, theirs = (
        bytearray((folder / "model.safetensors").read_bytes()) for folder in (tmp_path / "merged", TINY)
    )
    assert len(ours) == len(theirs)
    for name, tensor in stored_tensors(TINY / "model.safetensors").items():
        assert (ours[tensor.start : tensor.end] != theirs[tensor.start : tensor.end]) == (
            name in update_of(run).adapted_names
        )
        ours[tensor.start : tensor.end] = theirs[tensor.start : tensor.end]
    assert ours == theirs, "the header, with its metadata"


def test_what_belongs_to_a_model_comes_along_and_nothing_else(
    sharded: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    belongs = {
        "generation_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "tokenizer.model",
        "LICENSE.txt",
        "additional_chat_templates/tools.jinja",
    }
    for name in belongs:
        (model / name).write_text(name)
    belongs |= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    }
    belongs |= {path.name for path in sharded.glob("*.safetensors")}
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "training_args.bin", "old.pt", "modeling_evil.py",
                 "tokenization_evil.py", "README.md", "adapter_config.json", "consolidated.safetensors", ".env"):  # fmt: skip
        (model / name).write_text("no")
    merge(make_run(model), tmp_path / "merged")
    there = {
        path.relative_to(tmp_path / "merged").as_posix()
        for path in (tmp_path / "merged").rglob("*")
        if path.is_file()
    }
    assert there == belongs
    for name in belongs:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "merged" / name).read_bytes() == (model / name).read_bytes()
            assert not os.path.samefile(tmp_path / "merged" / name, model / name), (
                "editing one must not edit the other"
            )


@pytest.mark.parametrize("shards", ["10GB", "100KB"], ids=["one file", "shards"])
def test_a_model_that_is_only_in_the_hubs_cache(
    small_model_folder: Path,
    stored_as: Store,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = stored_as(small_model_folder, torch.bfloat16, shards)
    snapshot = as_cached(model, tmp_path / "hub/models--owner--name")
    run = make_run(ModelSettings(name="owner/name", quantisation="none", dtype="float32"))
    assert run.config["model_revision"] == COMMIT
    (tmp_path / "hub/models--owner--name/refs/main").write_text("f" * 40)  # the branch has moved on since
    # Every use of the run takes the commit that it was made with.
    assert load_run(run, torch.device("cpu"))[1].name_or_path == "owner/name"
    assert find_subject(str(run.path)).spec.settings.revision == COMMIT
    merge(run, tmp_path / "merged")
    assert_equal(weights(tmp_path / "merged"), merged_by_peft(model, run, torch.bfloat16))
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in snapshot.iterdir()
    }
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def as_cached(model: Path, repository: Path) -> Path:
    """The layout of the Hub's cache: a snapshot of links to files that are named by their content."""
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repository / f"blobs/{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_an_empty_folder_and_one_in_a_new_folder_are_both_filled(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(TINY)
    (tmp_path / "empty").mkdir()
    for to in (tmp_path / "empty", tmp_path / "new/folder"):
        merge(run, to)
        assert json.loads((to / "config.json").read_text()) == json.loads((TINY / "config.json").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
