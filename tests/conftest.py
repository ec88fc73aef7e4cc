"""Shared by all tests: the shipped tiny model, and a random small Mistral with its tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from lowmem_rmu.presets import ModelSettings

TINY = Path(__file__).parent.parent / "lowmem_rmu/tiny"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="session")
def small_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A Mistral checkpoint of six layers with random weights (large enough that layers matter), and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=None, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_settings(small_model_folder: Path) -> ModelSettings:
    """The random model, unquantised in float32."""
    return ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32")
