"""Shared by all tests: the shipped tiny model, small random models (a Mistral and a Mixtral) with its tokenizer, and a run that forgot."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner

from lowmem_rmu.cli import run as command_line
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.runs.folder import RunFolder
from tests.families import FAMILIES, Family

TINY = Path(__file__).parent.parent / "lowmem_rmu/tiny"
QUICK = [
    "rmu.target_layer=3",
    "rmu.adapter_layers=[1, 2, 3]",
    "rmu.steps=60",
    "rmu.learning_rate=1e-2",
    "rmu.batch_size=8",
    "rmu.retain_batch_size=16",
    "topics.compounds.alpha=5",
    "topics.locks.alpha=5",
    "topics.compounds.adaptive_scale=3",
    "topics.locks.adaptive_scale=3",
    "evaluation.limit=60",
    "evaluation.prompts=[]",
    "topics.compounds.corpus.held_out=0",
    "topics.locks.corpus.held_out=0.1",
]
"""Settings that forget within seconds, if not for long."""


MODEL_FIXTURES = {
    "small_model_folder",
    "small_mixtral_folder",
    "family",
    "forgetful",
    "merged_by_peft",
    "finished",
    "tiny",
}
"""Fixtures that load or train a model."""
MODEL_FOLDERS = {"audit", "benchmarks", "export", "memory", "model", "tiny", "unlearning", "weights"}
"""Folders all of whose tests count as `model`, as most of them do."""
MODEL_FILES = {
    "test_chat.py",
    "test_damage.py",
    "test_every_change.py",
    "test_families.py",
    "test_harness_parity.py",
    "test_kill.py",
    "test_main.py",
    "test_measure.py",
    "test_neighbors.py",
    "test_report.py",
    "test_run.py",
    "test_queue.py",
}
"""Files whose tests start processes or work with models."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its tier: `unit`, `model`, `app` or `browser`."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if "browser" in fixtures:
            tier = "browser"
        elif folder == "ui" or item.path.name == "test_app.py":
            tier = "app"
        elif folder in MODEL_FOLDERS or item.path.name in MODEL_FILES or fixtures & MODEL_FIXTURES:
            tier = "model"
        else:
            tier = "unit"
        item.add_marker(tier)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="session")
def save_random(tokenizer: PreTrainedTokenizerBase) -> Callable[[PretrainedConfig, Path], Path]:
    """Writes a checkpoint with random weights and the tiny tokenizer into a folder, and gives the folder back."""

    def save(config: PretrainedConfig, folder: Path) -> Path:
        config.update(
            {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        with torch.random.fork_rng():
            torch.manual_seed(7)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def small_model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    save_random: Callable[[PretrainedConfig, Path], Path],
) -> Path:
    """A Mistral checkpoint of six layers with random weights (large enough that layers matter), and the tiny tokenizer."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        initializer_range=0.2,
    )
    return save_random(config, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_mixtral_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    save_random: Callable[[PretrainedConfig, Path], Path],
) -> Path:
    """The same with a mixture of four experts, of which a token takes two."""
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return save_random(config, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session", params=FAMILIES)
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    save_random: Callable[[PretrainedConfig, Path], Path],
) -> Family:
    """One architecture after the other."""
    shape, module = FAMILIES[request.param]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIG_MAPPING[request.param](vocab_size=len(tokenizer), **special, **shape)
    return Family(request.param, save_random(config, tmp_path_factory.mktemp(request.param)), module)


@pytest.fixture
def small_settings(small_model_folder: Path) -> ModelSettings:
    """The random model, unquantised in float32."""
    return ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32")


@pytest.fixture
def mixtral_settings(small_mixtral_folder: Path) -> ModelSettings:
    """The random mixture of experts in 4-bit."""
    return ModelSettings(name=str(small_mixtral_folder), quantisation="nf4", dtype="float32")


@pytest.fixture(scope="session")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose forgotten tasks fell far, and whose kept tasks stayed; read only."""
    runs_dir, app = tmp_path_factory.mktemp("runs"), typer.Typer()
    app.command()(command_line.run)
    settings = [part for setting in QUICK for part in ("--set", setting)]
    result = CliRunner().invoke(
        app, ["tiny", *settings, "--runs-dir", str(runs_dir), "--name", "forgetful", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    return RunFolder(runs_dir / "forgetful")


@pytest.fixture(scope="session")
def merged_by_peft(forgetful: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The update merged into the base's own checkpoint in bfloat16; read only."""
    folder = tmp_path_factory.mktemp("merged")
    base = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, forgetful.adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(forgetful: RunFolder, tmp_path: Path) -> Path:
    """The adapter in a folder of its own."""
    return Path(shutil.copytree(forgetful.adapter, tmp_path / "adapter"))


@pytest.fixture
def merged(merged_by_peft: Path, tmp_path: Path) -> Path:
    """The merged model in a folder of its own."""
    return Path(shutil.copytree(merged_by_peft, tmp_path / "merged"))
