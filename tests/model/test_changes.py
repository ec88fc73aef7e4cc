"""What an adapter changes in a checkpoint whose tensors are named otherwise than the model's parameters, and what is recorded of it."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.changes import LowRank, Stacked, adapted_digests, read_changes
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights.stored import checkpoint_tensors

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def adapter(small_settings: ModelSettings, tmp_path: Path) -> Path:
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], modules=["down_proj"], rank=4)
    save_adapter(add_adapter(load_model(small_settings, CPU), rmu, small_settings), tmp_path / "adapter")
    return tmp_path / "adapter"


def renamed(folder: Path, to: Path, cut: str) -> ModelSettings:
    """The checkpoint with its tensors' names without their beginning, as some are published."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = {
        name.removeprefix(cut): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return ModelSettings(name=str(to))


def test_digests_are_of_the_adapted_matrices_bytes(
    small_settings: ModelSettings, small_model_folder: Path, adapter: Path
) -> None:
    digests = adapted_digests(adapter, ModelSpec(small_settings), 4)
    assert list(digests) == [DOWN, DOWN.replace("1", "3")]
    matrix = load_file(small_model_folder / "model.safetensors")[DOWN]
    assert digests[DOWN] == hashlib.sha256(matrix.numpy().tobytes()).hexdigest()


def test_a_checkpoint_that_leaves_out_the_beginning_of_names(
    small_model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    settings = renamed(small_model_folder, tmp_path / "model", "model.")
    changes = read_changes(adapter, ModelSpec(settings), checkpoint_tensors(settings))
    assert list(changes) == ["layers.1.mlp.down_proj.weight", "layers.3.mlp.down_proj.weight"]


def test_a_checkpoint_of_another_architecture_says_which_matrix_is_missing(
    small_mixtral_folder: Path, adapter: Path
) -> None:
    settings = ModelSettings(name=str(small_mixtral_folder))
    with pytest.raises(
        UserError, match=f"has no tensor of its own for {DOWN}, which the adapter {adapter} changes"
    ):
        read_changes(adapter, ModelSpec(settings), checkpoint_tensors(settings))


def test_experts_below_one_another_change_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [
        LowRank(torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator), 0.5)
        for _ in range(3)
    ]
    stacked, rows = Stacked(experts), torch.randn(12, 5, generator=generator)
    whole = torch.cat(
        [
            torch.add(part, 0.5 * expert.b @ expert.a)
            for part, expert in zip(rows.split(4), experts, strict=True)
        ]
    )
    assert stacked.shape == (12, 5)
    for first, last in ((0, 12), (0, 3), (3, 5), (2, 11), (8, 12)):
        assert torch.allclose(stacked.apply(rows[first:last], first), whole[first:last])
