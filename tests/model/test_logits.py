"""Logits in pieces are the model's own logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.model.logits import POSITIONS, logits_at
from tests.families import Family

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.randint(3, 100, (3, 90), generator=torch.Generator().manual_seed(1))
ASKED = torch.rand(3, 90, generator=torch.Generator().manual_seed(2)) < 0.7


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0)],
    ids=["llama", "gemma2"],
)
@torch.no_grad()
def test_pieces_are_the_whole_models_logits_in_their_order(config: PretrainedConfig) -> None:
    """Gemma 2 caps its logits: what the model does to them after the head is done to the pieces as well."""
    model = AutoModelForCausalLM.from_config(config).eval()
    pieces = list(logits_at(model, ASKED, input_ids=IDS))
    assert [len(piece) for piece in pieces[:-1]] == [POSITIONS] * (len(pieces) - 1)
    assert len(pieces) > 1
    torch.testing.assert_close(torch.cat(pieces), model(IDS).logits[ASKED], rtol=1e-5, atol=1e-5)
    assert "forward" not in model.get_decoder().__dict__


@torch.no_grad()
def test_an_adapter_counts(small_settings: ModelSettings) -> None:
    model = add_adapter(
        load_model(small_settings, torch.device("cpu")),
        Rmu(target_layer=2, adapter_layers=[2], rank=4),
        small_settings,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1
    ids, asked = IDS[:, :20], ASKED[:, :20]
    torch.testing.assert_close(
        torch.cat(list(logits_at(model, asked, input_ids=ids))),
        model(ids).logits[asked],
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_every_family_gives_its_own_logits(family: Family) -> None:
    """What stands in for a decoder answers as that decoder: mixtures add router logits, GPT-NeoX calls it by position."""
    model = load_model(family.settings, torch.device("cpu"))
    pieces = torch.cat(list(logits_at(model, ASKED, input_ids=IDS)))
    torch.testing.assert_close(pieces, model(IDS).logits[ASKED], rtol=1e-4, atol=1e-4)
