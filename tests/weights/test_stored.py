"""Tensors are found where they lie, and read a few rows at a time."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.weights import stored
from lowmem_rmu.weights.stored import as_bytes, checkpoint_tensors, stored_tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "matrix": torch.randn(200, 7),
        "half": torch.randn(5, 4).half(),
        "experts": torch.randn(3, 4, 5).bfloat16(),
        "bias": torch.randn(9),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_whole_tensors_and_rows_are_safetensors_own(file: Path) -> None:
    tensors, content = stored_tensors(file), file.read_bytes()
    expected = load_file(file)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.whole(), expected[name])
        assert content[tensor.start : tensor.end] == bytes(as_bytes(expected[name]))
        assert tensor.digest() == hashlib.sha256(content[tensor.start : tensor.end]).hexdigest()
    assert torch.equal(tensors["matrix"].rows(3, 150), expected["matrix"][3:150])
    assert torch.equal(tensors["experts"].rows(3, 6), expected["experts"].view(12, 5)[3:6])
    assert [tensor.start for tensor in tensors.values()] == sorted(
        tensor.start for tensor in tensors.values()
    )


EVEN = [(0, 64), (64, 128)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2**20, [(0, 200)]), (64 * 7 * 4, [*EVEN, (128, 200)]), (1, [*EVEN, (128, 192), (192, 200)])],
)
def test_pieces_cover_every_row_once_and_begin_at_even_places(
    file: Path, monkeypatch: pytest.MonkeyPatch, size: int, expected: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(stored, "PIECE", size)
    assert list(stored_tensors(file)["matrix"].pieces()) == expected


def test_a_digest_is_the_same_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored_tensors(file)["matrix"].digest()
    monkeypatch.setattr(stored, "PIECE", 1000)
    assert stored_tensors(file)["matrix"].digest() == before


def test_a_file_that_shrinks_while_it_is_read_is_told(file: Path) -> None:
    tensor = list(stored_tensors(file).values())[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"file {file} is damaged or cut short"):
        tensor.whole()
    with pytest.raises(UserError, match=f"file {file} is damaged or cut short: "):
        stored_tensors(file)


def test_a_checkpoint_is_all_its_files_and_of_the_first_layers_only_theirs(
    small_model_folder: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(small_model_folder).save_pretrained(tmp_path, max_shard_size="50KB")
    settings = ModelSettings(name=str(tmp_path))
    assert checkpoint_tensors(settings).keys() == load_file(small_model_folder / "model.safetensors").keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first = checkpoint_tensors(settings, 1)
    assert all(first[name].file == tmp_path / index[name] for name in first)
    assert "model.layers.0.mlp.down_proj.weight" in first
    assert "model.layers.5.mlp.down_proj.weight" not in first
