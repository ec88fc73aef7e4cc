"""The truncated forward: equal to the whole model's own, shared, and with nothing left behind."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import load_model
from tests.families import Family

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral with a window": lambda: MistralConfig(**SHAPE, sliding_window=4),
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
}
UPDATED = slice(2, 5)
TARGET = UPDATED.stop - 1
IDS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = (12, 7, 9)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param]())


@pytest.fixture
def llama() -> PreTrainedModel:
    return random_model(CONFIGS["llama"]())


def target_output(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What leaves the target layer in a plain forward pass of the whole model."""
    seen: list[Tensor] = []
    hook = decoder_layers(model)[TARGET].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=attention_mask)
    hook.remove()
    return seen[0]


def truncated(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return run_layers(model, run_trunk(model, input_ids, attention_mask, UPDATED), UPDATED)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """`IDS` cut to `LENGTHS` and padded with 0; the ids and where they are tokens."""
    ids, is_token = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        columns = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, columns], is_token[row, columns] = IDS[row, :length], 1
    return ids, is_token


@pytest.mark.parametrize("updated", [slice(0, 1), slice(0, 6), slice(2, 5), slice(5, 6)], ids=str)
def test_any_stretch_of_layers_gives_what_the_whole_model_gives(
    llama: PreTrainedModel, updated: slice
) -> None:
    result = run_layers(llama, run_trunk(llama, IDS, None, updated), updated)
    hidden_states = llama.model(IDS, output_hidden_states=True).hidden_states
    if updated.stop < 6:
        assert torch.equal(result, hidden_states[updated.stop])
    else:
        assert torch.equal(llama.model.norm(result), hidden_states[-1])


def test_every_family_gives_what_its_target_layer_gives(family: Family) -> None:
    """With what enters the first updated layer known, and computed."""
    model, updated = load_model(family.settings, torch.device("cpu")), slice(1, 3)
    seen: list[Tensor] = []
    hook = decoder_layers(model)[2].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(IDS)
    hook.remove()
    trunk = run_trunk(model, IDS, None, updated)
    torch.testing.assert_close(run_layers(model, trunk, updated), seen[0])
    known = run_trunk(model, IDS, None, updated, trunk.hidden)
    torch.testing.assert_close(run_layers(model, known, updated), seen[0])
    fewer = run_trunk(model, IDS[:1], None, updated, trunk.hidden[:1])
    torch.testing.assert_close(run_layers(model, fewer, updated), seen[0][:1], rtol=1e-4, atol=1e-4)


def test_right_padding_needs_no_mask(model: PreTrainedModel) -> None:
    ids, _ = padded("right")
    activations = truncated(model, ids)
    assert torch.equal(activations, target_output(model, ids))
    for row, length in enumerate(LENGTHS):
        alone = target_output(model, IDS[row : row + 1, :length])
        torch.testing.assert_close(activations[row, :length], alone[0], rtol=1e-4, atol=1e-4)


def test_left_padding_takes_a_mask(model: PreTrainedModel) -> None:
    ids, mask = padded("left")
    activations = truncated(model, ids, mask)
    assert torch.equal(activations, target_output(model, ids, mask))
    for row, length in enumerate(LENGTHS):
        alone = target_output(model, IDS[row : row + 1, :length])
        torch.testing.assert_close(activations[row, -length:], alone[0], rtol=1e-3, atol=1e-3)


def test_activations_of_a_cut_model_are_taken_before_its_norm(small_settings: ModelSettings) -> None:
    """Trap 2: `hidden_states[-1]` of a model cut to k layers is taken after the final norm."""
    cut, whole = (
        load_model(small_settings, torch.device("cpu"), layers=TARGET + 1),
        load_model(small_settings, torch.device("cpu")),
    )
    activations = truncated(cut, IDS)
    assert torch.equal(activations, target_output(whole, IDS))
    assert not torch.allclose(
        activations, cut.model(IDS, output_hidden_states=True).hidden_states[-1], atol=0.1
    )


def test_known_hidden_states_stand_in_for_the_layers_below(model: PreTrainedModel) -> None:
    ids, mask = padded("left")
    trunk = run_trunk(model, ids, mask, UPDATED)
    for layer in list(decoder_layers(model))[: UPDATED.start]:
        layer.self_attn.register_forward_hook(lambda *_: pytest.fail("a layer below ran"))
    again = run_trunk(model, ids, mask, UPDATED, trunk.hidden)
    assert again.hidden is trunk.hidden
    assert torch.equal(run_layers(model, again, UPDATED), run_layers(model, trunk, UPDATED))
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_samples_alone_give_what_they_give_in_the_batch(model: PreTrainedModel, side: str) -> None:
    ids, mask = padded(side)
    given = mask if side == "left" else None
    trunk = run_trunk(model, ids, given, UPDATED)
    whole = run_layers(model, trunk, UPDATED)
    for samples in (1, 2, None):
        first = run_trunk(
            model,
            ids[:samples],
            given[:samples] if given is not None else None,
            UPDATED,
            trunk.hidden[:samples],
        )
        some = run_layers(model, first, UPDATED)
        assert some.shape == whole[:samples].shape
        torch.testing.assert_close(some, whole[:samples], rtol=1e-4, atol=1e-4)


def test_forwards_are_given_back_after_success(llama: PreTrainedModel) -> None:
    logits = llama(IDS).logits
    run_trunk(llama, IDS, None, UPDATED)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(llama))
    assert torch.equal(llama(IDS).logits, logits)


def test_forwards_are_given_back_after_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(IndexError):
        run_trunk(llama, torch.tensor([[1000]]), None, UPDATED)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(llama))


@pytest.mark.parametrize("token", [5, 1000], ids=["success", "error"])
def test_a_forward_that_was_hooked_before_is_given_back(llama: PreTrainedModel, token: int) -> None:
    """As accelerate leaves it where it has dispatched a model."""
    layer = decoder_layers(llama)[TARGET]
    own = layer.forward
    hooked = lambda *arguments, **options: own(*arguments, **options)  # noqa: E731
    layer.forward = hooked
    try:
        run_trunk(llama, torch.tensor([[token]]), None, UPDATED)
    except IndexError:
        assert token == 1000
    assert layer.__dict__["forward"] is hooked


def test_nothing_above_the_target_runs_and_lower_layers_run_once_without_gradients(
    llama: PreTrainedModel,
) -> None:
    calls: Counter[str] = Counter()
    modes = set()
    watched = {f"layer {index}": layer for index, layer in enumerate(decoder_layers(llama))} | {
        "norm": llama.model.norm,
        "head": llama.lm_head,
    }

    def note(name: str) -> None:
        calls[name] += 1
        if name in ("layer 0", "layer 1"):
            modes.add(torch.is_grad_enabled())

    # The attention of a layer runs only where the layer truly computes.
    for name, module in watched.items():
        inner = module.self_attn if hasattr(module, "self_attn") else module
        inner.register_forward_hook(lambda *_, name=name: note(name))
    llama.requires_grad_(True)
    trunk = run_trunk(llama, IDS, None, UPDATED)
    assert not trunk.hidden.requires_grad
    assert calls == {"layer 0": 1, "layer 1": 1}
    run_layers(llama, trunk, UPDATED)
    run_layers(llama, trunk, UPDATED)
    assert calls == {"layer 0": 1, "layer 1": 1, "layer 2": 2, "layer 3": 2, "layer 4": 2}
    assert modes == {False}


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_activation_checkpointing_changes_no_gradient(
    small_settings: ModelSettings, quantisation: str
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    model = add_adapter(
        load_model(settings, torch.device("cpu")),
        Rmu(target_layer=TARGET, adapter_layers=[2, 3, 4]),
        settings,
    )
    saved: list[int] = []
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        trunk = run_trunk(model, IDS, None, UPDATED)
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run_layers(model, trunk, UPDATED, activation_checkpointing=recompute).square().mean()
        saved.append(kept)
        loss.backward()
        gradients.append(
            [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        )
    assert any(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert saved[1] < saved[0] / 2


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    """BERT keeps its layers under another name than any model that RMU knows."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(BertConfig(vocab_size=50, is_decoder=True, **shape))
    with pytest.raises(
        UserError, match="BertLMHeadModel is no decoder with a list of layers, which is what RMU steers"
    ):
        decoder_layers(model)
