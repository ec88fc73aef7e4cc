"""The benchmark runs on a small shape, and its checkpoint and run are such as the export takes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot
from transformers import AutoModelForCausalLM

from benchmarks.export import main, make_checkpoint, make_run, measure, shards_of
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.weights.stored import checkpoint_tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    preset = load_preset("tiny", ["rmu.target_layer=3", "rmu.adapter_layers=[1,2,3]"])
    config = ModelSpec.of_preset(preset).shape
    make_checkpoint(config, tmp_path / "model", 10**6)
    model = preset.model.model_copy(update={"name": str(tmp_path / "model")})
    return make_run(preset.model_copy(update={"model": model}), tmp_path / "run")


def test_it_prints_all_beside_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(shape="tiny", layers=4, shard_size=0.001, repeats=1, warm_up=0, sync=True, place=tmp_path)
    said = capsys.readouterr().out
    title = next(line.strip() for line in said.splitlines() if "0.00 GB" in line)
    assert re.sub(r"\b[2-9] ", "<several> ", title) == snapshot(
        "0.00 GB in <several> shards, largest tensor 0 MB, synced"
    )
    assert re.search(
        r"shutil\.copytree +│ +[\d.]+ │ +[\d.]+ to [\d.]+ │ +1\.00x │ +[\d.]+ │ +\d+ MB │ +\d+ MB │", said
    )
    for name in ("merge, everything copied", "merge, unchanged files linked"):
        assert re.search(
            rf"{name} +│ +[\d.]+ │ +[\d.]+ to [\d.]+ │ +[\d.]+x │ +[\d.]+ │ +\d+ MB │ +\d+ MB │", said
        )
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_whole_and_the_run_fits_it(run: RunFolder, tmp_path: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    merged = merge(run, tmp_path / "merged")
    assert merged.checked
    assert merged.tensors == 21
    assert merged.rewritten
    assert merged.linked


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """400 MB, a matrix of which takes 16 to 65 MB in float32: a few pieces of 4 MB are in memory at a time."""
    preset = load_preset("zephyr-7b")
    config = ModelSpec.of_preset(preset).shape
    config.update(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        }
    )
    make_checkpoint(config, tmp_path / "model", 10**8)
    model = preset.model.model_copy(update={"name": str(tmp_path / "model")})
    run = make_run(preset.model_copy(update={"model": model}), tmp_path / "run")
    took = measure("copies", run, tmp_path / "model", tmp_path / "to", sync=False)
    assert took.peak - took.libraries < 80e6


def test_shards_are_no_larger_than_asked_for() -> None:
    sizes = [
        sum(2 * tensor.numel() for tensor in shard.values())
        for shard in shards_of(ModelSpec.of_preset(load_preset("tiny")).shape, 10**6)
    ]
    assert len(sizes) > 3
    assert max(sizes) <= 10**6


def test_what_a_process_took_is_its_own_and_leaves_no_files(run: RunFolder, tmp_path: Path) -> None:
    copied, merged = (
        measure(kind, run, tmp_path / "model", tmp_path / "to", sync=False) for kind in ("copy", "copies")
    )
    assert copied.libraries < 50e6 < merged.libraries <= merged.peak
    assert min(copied.seconds, merged.seconds) > 0
    assert not (tmp_path / "to").exists()
    assert json.loads((run.path / "config.json").read_text())["preset"] == "benchmark"
    assert {tensor.kind for tensor in checkpoint_tensors(load_preset("tiny").model).values()} == {"BF16"}
