"""What names a model's answers: everything that decides them, as one short digest."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lowmem_rmu import __version__
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.model.loading import resolve_dtype
from lowmem_rmu.weights.shards import find_files

DECIDING = ("torch", "transformers", "tokenizers", "bitsandbytes")
"""Packages another version of which may answer otherwise."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def model_digest(
    settings: ModelSettings, config: PretrainedConfig, device: torch.device, unquantised: Sequence[str]
) -> str:
    """Return a digest of the weights, the tokenizer, the precision, the kind of device and the versions of
    the packages.
    """
    deciding_config = config.to_diff_dict()
    weights = find_files(settings.name, settings.revision, None)
    tokenizer = [file for name in TOKENIZER_FILES if (file := weights[0].parent / name).exists()]
    deciding: dict[str, Any] = {
        "files": {file.name: content_digest(file) for file in [*weights, *tokenizer]},
        "config": deciding_config,
        "precision": [settings.quantisation, str(resolve_dtype(settings, device)), sorted(unquantised)],
        "device": device.type,
        "versions": {package: version(package) for package in DECIDING} | {"lowmem-rmu": __version__},
    }
    # Where the model lies and who wrote it decide nothing.
    for where in (
        "_name_or_path",
        "transformers_version",
    ):
        deciding_config.pop(where, None)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:24]


def content_digest(file: Path) -> str:
    """Return the Hub's cache names files by their content; any other file is read."""
    stored = file.resolve()
    if file.is_symlink() and stored.parent.name == "blobs":
        return stored.name
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
