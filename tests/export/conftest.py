"""Runs to export: a folder as a run leaves it, with an adapter that changes something, without the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_rmu.config.schema import Corpus, ModelSettings, Preset, Retain, Rmu, Topic
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.changes import adapted_digests
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.pipeline import run_config
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder

CPU = torch.device("cpu")
RMU = {
    "target_layer": 3,
    "adapter_layers": [1, 3],
    "modules": ["down_proj", "q_proj"],
    "rank": 4,
    "lora_alpha": 6,
}


def save_run(folder: Path, settings: ModelSettings, **rmu: Any) -> RunFolder:
    """A finished run on the model, whose adapter is random."""
    corpus = Corpus(source="./nowhere")
    preset = Preset(
        title="made up",
        model=settings,
        rmu=Rmu.model_validate(RMU | rmu),
        topics={"topic": Topic(corpus=corpus, alpha=1)},
        retain=Retain(corpora=[corpus]),
    )
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    write_json(run.path / "config.json", run_config("made-up", preset, CPU))
    unquantised = settings.model_copy(update={"quantisation": "none", "dtype": "float32"})
    model = add_adapter(load_model(unquantised, CPU), preset.rmu, settings)
    with torch.no_grad():
        for seed, parameter in enumerate(each for each in model.parameters() if each.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, run.adapter)
    write_json(run.matrices, adapted_digests(run.adapter, ModelSpec(settings), preset.rmu.target_layer + 1))
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Of a model's folder, or of settings; what else is given are settings of RMU."""

    def make(model: Path | ModelSettings, **rmu: Any) -> RunFolder:
        settings = (
            model
            if isinstance(model, ModelSettings)
            else ModelSettings(name=str(model), quantisation="none", dtype="float32")
        )
        return save_run(tmp_path / "runs" / "made", settings, **rmu)

    return make


@pytest.fixture(scope="session")
def stored_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint again, in another dtype and in shards of at most so many bytes."""

    def store(source: Path, dtype: torch.dtype, shards: str = "10GB", **how: Any) -> Path:
        folder = tmp_path_factory.mktemp("stored") / "model"
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(
            folder, max_shard_size=shards, **how
        )
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return store
