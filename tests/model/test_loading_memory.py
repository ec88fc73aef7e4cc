"""Loading never holds the whole checkpoint: measured as the peak of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig, PretrainedConfig

from lowmem_rmu.model.quantization import PIECE

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MANY_LAYERS = MistralConfig(**SHAPE, intermediate_size=2816, num_hidden_layers=12)
LARGE_HEAD = MistralConfig(**SHAPE | {"vocab_size": 80_000}, intermediate_size=256, num_hidden_layers=3)
MIXTURE = MixtralConfig(**SHAPE, intermediate_size=1024, num_hidden_layers=4, num_local_experts=8)
MIB = 2**20
MEASURED = """
import gc, json, sys
from pathlib import Path
import torch
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.config.schema import ModelSettings

def memory():  # in bytes
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}

def load(folder, layers):
    return load_model(ModelSettings(name=folder, quantisation="nf4", dtype="bfloat16"), torch.device("cpu"), layers)

small, large, layers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load(small, None)  # what libraries keep from their first use does not count
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory()["VmRSS"]
model = load(large, layers)
held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({"held": held, "peak": memory()["VmHWM"] - before}))
"""


def checkpoint_of(config: PretrainedConfig, folder: Path) -> int:
    """Writes a checkpoint of halves in bfloat16, in shards; gives its bytes. (One of zeros is refused as damaged.)"""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(folder, max_shard_size="40MB")
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def peak_of_loading(small: Path, large: Path, layers: int | None) -> tuple[int, int]:
    """Bytes: what the loaded model holds, and by how much the process grew at most."""
    command = [sys.executable, "-c", MEASURED, str(small), str(large), json.dumps(layers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    return figures["held"], figures["peak"]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


@needs_proc
@pytest.mark.parametrize(
    ("config", "largest"),
    [(MANY_LAYERS, 2816 * 1024), (MIXTURE, 8 * 2 * 1024 * 1024)],
    ids=["dense", "mixture"],
)
def test_a_model_is_quantised_weight_by_weight(
    small_model_folder: Path, tmp_path: Path, config: PretrainedConfig, largest: int
) -> None:
    stored = checkpoint_of(config, tmp_path)
    held, peak = peak_of_loading(small_model_folder, tmp_path, None)
    assert held < 0.3 * stored
    # The largest weight in 16 bits: thrice where experts are fused, once while it is quantised in pieces; and 16 MiB for the allocator.
    assert peak < held + 2 * largest + max(2 * 2 * largest, 16 * min(PIECE, largest)) + 16 * MIB


@needs_proc
def test_a_cut_model_never_has_a_head(small_model_folder: Path, tmp_path: Path) -> None:
    checkpoint_of(LARGE_HEAD, tmp_path)
    held, peak = peak_of_loading(small_model_folder, tmp_path, 2)
    head = 80_000 * 1024 * 2
    assert peak < held + head / 2
