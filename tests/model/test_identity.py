"""What names a model's answers changes with everything that decides them, and with nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.model import identity
from lowmem_rmu.model.identity import content_digest
from lowmem_rmu.model.spec import ModelSpec

CPU = torch.device("cpu")


@pytest.fixture
def copied(small_model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_model_folder, tmp_path / "copy")


def digest(folder: Path, **settings: str) -> str:
    return ModelSpec(
        ModelSettings.model_validate({"name": str(folder), "quantisation": "none"} | settings)
    ).digest(CPU)


def test_a_copy_elsewhere_is_the_same_model(small_model_folder: Path, copied: Path) -> None:
    assert digest(copied) == digest(small_model_folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_one_other_byte_of_weights_or_tokenizer_is_another_model(
    small_model_folder: Path, copied: Path, file: str
) -> None:
    content = bytearray((copied / file).read_bytes())
    content[-2] ^= 1
    (copied / file).write_bytes(content)
    assert digest(copied) != digest(small_model_folder)


def test_another_shape_of_the_same_weights_is_another_model(small_model_folder: Path, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert digest(copied) != digest(small_model_folder)


def test_precision_device_and_versions_decide(
    small_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(name=str(small_model_folder), quantisation="nf4")
    found = [
        digest(small_model_folder),
        digest(small_model_folder, dtype="bfloat16"),
        ModelSpec(settings).digest(CPU),
        ModelSpec(settings, trained=["model.layers.1.mlp.down_proj"]).digest(CPU),
        ModelSpec(settings).digest(torch.device("cuda")),
    ]
    monkeypatch.setattr(identity, "version", lambda package: f"{package} of tomorrow")
    assert len({*found, ModelSpec(settings).digest(CPU)}) == 6


def test_the_hub_cache_names_files_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0123abcd").write_text("weights")
    (tmp_path / "link").symlink_to(tmp_path / "blobs/0123abcd")
    assert content_digest(tmp_path / "link") == "0123abcd"
    (tmp_path / "file").write_text("weights")
    (tmp_path / "other link").symlink_to(tmp_path / "file")
    assert content_digest(tmp_path / "other link") == content_digest(tmp_path / "file") != "0123abcd"
