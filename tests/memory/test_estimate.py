"""The memory plan against real storage."""

import sys
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Preset, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.estimate import (
    NF4_BYTES,
    Needs,
    StageNeed,
    gib,
    memory_available,
    memory_in_use,
    plan,
    reset_peak,
)
from lowmem_rmu.model import spec
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.counts import count_weights
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import describe_weights, load_config, load_model, skeleton
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import STAGES
from lowmem_rmu.weights import shards
from tests.families import Family

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def zephyr(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The shipped preset; whoever asks for the model's own configuration would need the network."""

    def no_network(_: ModelSettings) -> None:
        raise AssertionError("the plan asked for the model")

    monkeypatch.setattr(spec, "load_config", no_network)
    return load_preset("zephyr-7b")


def planned(preset: Preset, device: torch.device, stages: Sequence[str] = STAGES) -> list[StageNeed]:
    return plan(preset, ModelSpec.of_preset(preset), device, stages)


def needs(preset: Preset, device: torch.device) -> Needs:
    return Needs(preset, ModelSpec.of_preset(preset), device)


def changed(preset: Preset, **rmu: Any) -> Preset:
    return preset.model_copy(update={"rmu": preset.rmu.model_copy(update=rmu)})


def unlearn_need(preset: Preset, whole_model: bool = True) -> StageNeed:
    return next(
        need
        for need in planned(preset, GPU, STAGES if whole_model else ["unlearn"])
        if need.stage == "unlearn"
    )


def test_weights_are_counted_as_the_model_has_them(small_settings: ModelSettings) -> None:
    model = load_model(small_settings, CPU)
    weights = ModelSpec(small_settings).weights(["down_proj", "q_proj"])
    assert weights.total() + model.model.norm.weight.numel() == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert weights.layers == 6
    assert weights.by_layer[0].linear == 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert weights.by_layer[0].other == 2 * 64
    assert weights.largest_linear == 64 * 128
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], rank=5)
    assert weights.learning(rmu) == 2 * 5 * ((128 + 64) + (64 + 64))
    assert weights.learning(rmu.model_copy(update={"trainable": "weights"})) == 2 * (128 * 64 + 64 * 64)


def test_experts_are_counted_with_their_adapters(mixtral_settings: ModelSettings) -> None:
    model = load_model(mixtral_settings, CPU)
    weights = ModelSpec(mixtral_settings).weights(["down_proj"])
    assert weights.total() + model.model.norm.weight.numel() == describe_weights(model)["weights"]
    assert sum(layer.linear for layer in weights.by_layer) == describe_weights(model)["in_4bit"]
    assert weights.experts == 4 * (2 * 128 * 64 + 64 * 128)
    assert weights.largest_linear == 4 * 2 * 128 * 64
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], modules=["down_proj"], rank=5)
    adapted = add_adapter(model, rmu, mixtral_settings)
    assert weights.learning(rmu) == sum(
        parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
    )


def test_every_family_is_counted_layer_by_layer(family: Family) -> None:
    """Layers of one model differ: DeepSeek-V3 is dense below its mixtures, LFM2 has attention in some layers only."""
    config = load_config(family.settings)
    layers = decoder_layers(skeleton(config))
    weights = ModelSpec(family.settings).weights([family.module])
    assert [layer.linear + layer.other for layer in weights.by_layer] == [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in layers
    ]
    rmu = Rmu(target_layer=2, adapter_layers=[1, 2], modules=[family.module], rank=5)
    adapted = add_adapter(skeleton(config), rmu, family.settings)
    assert weights.learning(rmu) == sum(
        parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize(
    ("family", "width"),
    [("llama", 64), ("gpt2", 128), ("mixtral", 128), ("qwen3_moe", 32), ("deepseek_v3", 64)],
    indirect=["family"],
)
def test_the_width_of_an_mlp_is_that_of_all_experts_that_a_token_takes(family: Family, width: int) -> None:
    assert max(layer.intermediate for layer in ModelSpec(family.settings).weights([]).by_layer) == width


def test_dequantised_experts_that_the_backward_pass_needs_are_planned_for(
    mixtral_settings: ModelSettings,
) -> None:
    """Counted as autograd counts: for every updated layer but the first, whose input takes no gradient."""
    zephyr, rmu = (
        load_preset("zephyr-7b"),
        Rmu(target_layer=3, adapter_layers=[1, 3], modules=["down_proj"], rank=5, batch_size=1),
    )
    model, updated, kept = (
        add_adapter(load_model(mixtral_settings, CPU), rmu, mixtral_settings),
        slice(1, 4),
        dict[int, int](),
    )

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.numel() >= 4 * 64 * 128:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        run_layers(model, run_trunk(model, torch.arange(5, 21)[None], None, updated), updated)
    # Next to no activations.
    topics = {name: topic.model_copy(update={"max_tokens": 2}) for name, topic in zephyr.topics.items()}
    retain = zephyr.retain.model_copy(update={"max_tokens": 2})
    small = zephyr.model_copy(
        update={"rmu": rmu, "topics": topics, "retain": retain, "model": mixtral_settings}
    )
    planned = (
        unlearn_need(small).working - unlearn_need(changed(small, activation_checkpointing=True)).working
    )
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)


def test_tied_embeddings_are_counted_once(small_settings: ModelSettings) -> None:
    config = load_config(small_settings)
    untied = count_weights(skeleton(config), ["down_proj"])
    config.tie_word_embeddings = True
    tied = count_weights(skeleton(config), ["down_proj"])
    assert (tied.head, untied.head) == (0, untied.embedding)


def test_nf4_bytes_are_what_bitsandbytes_stores() -> None:
    """Trap 7: the quantisation constants count."""
    linear = Linear4bit(4096, 1024, bias=False, compress_statistics=True, quant_type="nf4").to(CPU)
    state = linear.weight.quant_state
    parts = [linear.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    stored = sum(part.numel() * part.element_size() for part in parts)
    assert linear.weight.numel() == 4096 * 1024 // 2  # two weights a byte
    assert stored == pytest.approx(NF4_BYTES * 4096 * 1024, rel=0.01)
    assert round(NF4_BYTES * 8, 2) == 4.13  # bits a weight


def test_a_truncated_model_needs_less_than_the_whole(zephyr: Preset) -> None:
    whole, cut = unlearn_need(zephyr), unlearn_need(zephyr, whole_model=False)
    assert cut.weights < whole.weights / 2
    assert cut.working == whole.working
    assert cut.total == cut.weights + cut.working


@pytest.mark.parametrize(
    "change",
    [{"activation_checkpointing": True}, {"batch_size": 2}, {"rank": 4}, {"adapter_layers": [7]}],
    ids=str,
)
def test_settings_that_save_memory_lower_the_plan(zephyr: Preset, change: dict[str, Any]) -> None:
    assert unlearn_need(changed(zephyr, **change)).working < unlearn_need(zephyr).working


def test_a_smaller_evaluation_batch_lowers_the_plan(zephyr: Preset) -> None:
    smaller = zephyr.model_copy(
        update={"evaluation": zephyr.evaluation.model_copy(update={"batch_tokens": 1024})}
    )
    assert planned(smaller, GPU)[0].working < planned(zephyr, GPU)[0].working


def test_the_plan_of_a_7b_model_needs_no_network_and_is_plausible(zephyr: Preset) -> None:
    base, _, unlearned = planned(zephyr, GPU)
    unlearn = unlearn_need(zephyr, whole_model=False)
    assert [need.stage for need in planned(zephyr, GPU)] == ["evaluate-base", "unlearn", "evaluate-unlearned"]
    assert unlearn.weights < 1.5 * 2**30
    # 7.2 billion weights at 4.13 bits, embeddings and head in bfloat16.
    assert 3.5 * 2**30 < base.weights < 4.5 * 2**30
    assert unlearned.weights - base.weights == 3 * 16 * (14336 + 4096) * 4
    assert all(need.working < 8 * 2**30 for need in (base, unlearn, unlearned))


def test_the_plan_follows_quantisation(zephyr: Preset) -> None:
    plain = zephyr.model_copy(update={"model": zephyr.model.model_copy(update={"quantisation": "none"})})
    weights = planned(plain, GPU)[0].weights
    assert weights == pytest.approx(7.24e9 * 2, rel=0.01)


def test_a_preset_without_a_shape_is_planned_from_the_model(
    zephyr: Preset, small_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "load_config", load_config)
    small = changed(zephyr, target_layer=5, adapter_layers=[3, 4, 5]).model_copy(
        update={"model": small_settings}
    )
    assert planned(small, CPU)[0].weights == (ModelSpec(small_settings).weights([]).total()) * 4


def test_a_target_layer_beyond_the_model_is_refused_by_the_plan(zephyr: Preset) -> None:
    with pytest.raises(UserError, match=r"rmu\.target_layer is 32, but the model has 32 layers"):
        planned(changed(zephyr, target_layer=32), GPU)


def test_the_cache_is_planned_where_it_is_kept(zephyr: Preset) -> None:
    on_cpu = {need.stage: need for need in planned(zephyr, CPU)}
    assert on_cpu["unlearn"].cache == 2**30  # the budget: there is more to keep
    assert on_cpu["evaluate-base"].cache == unlearn_need(zephyr).cache == 0  # a GPU's memory holds none of it
    assert next(need.cache for need in planned(changed(zephyr, cache_in="disk"), CPU, ["unlearn"])) == 0


def test_whole_matrices_are_planned_with_gradients_and_moments(zephyr: Preset) -> None:
    matrices = 3 * 4096 * 14336
    lora, whole, eight = (unlearn_need(changed(zephyr, **change)) for change in (
        {}, {"trainable": "weights"}, {"trainable": "weights", "optimizer": "adamw8bit"}))  # fmt: skip
    assert whole.weights - lora.weights == pytest.approx(matrices * (2 - NF4_BYTES), rel=1e-3)
    assert whole.working - lora.working == pytest.approx(matrices * 16, rel=0.05)
    assert whole.working - eight.working == matrices * 6


def test_memory_of_this_process_is_counted_in_bytes() -> None:
    block = bytearray(b"x") * (64 * 2**20)
    assert 2**26 < memory_in_use(CPU) < 2**38
    assert memory_available(CPU) > 0
    del block


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_a_peak_is_remembered_until_it_is_reset() -> None:
    reset_peak(CPU)
    before = memory_in_use(CPU)
    with mmap(-1, 2**28) as block:  # not from the heap, which may have it free already
        block[::4096] = bytes(2**16)  # touches every page
    assert memory_in_use(CPU) - before > 0.9 * 2**28
    reset_peak(CPU)
    assert memory_in_use(CPU) - before < 0.1 * 2**28


@pytest.mark.parametrize(
    ("size", "text"),
    [(3 * 2**30, "3.00 GiB"), (2**28, "0.25 GiB"), (2**28 - 1, "256 MiB"), (5 * 2**20, "5 MiB")],
)
def test_sizes_are_printed_in_gib_or_mib(size: int, text: str) -> None:
    assert gib(size) == text


SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def with_config(preset: Preset, **config: Any) -> Preset:
    return changed(preset, modules=["fc2"], target_layer=2, adapter_layers=[1]).model_copy(
        update={"model": preset.model.model_copy(update={"config": config})}
    )


def test_a_model_that_calls_its_intermediate_size_otherwise_is_planned_the_same(zephyr: Preset) -> None:
    needs = [
        planned(with_config(zephyr, model_type="opt", ffn_dim=width, word_embed_proj_dim=64, **SHAPE), GPU)
        for width in (128, 8192)
    ]
    assert needs[1][1].working > 10 * needs[0][1].working > 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "llava"}, "which has parts for more than text"),
        ({"model_type": "no_such_model"}, "model.config of the preset is no configuration of a model"),
        (SHAPE, "model.config of the preset is no configuration of a model"),
        (SHAPE | {"model_type": "llama", "num_hidden_layers": 10**9}, "which no model has"),
    ],
)
def test_a_shape_that_cannot_be_planned_is_told_in_words(
    zephyr: Preset, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        planned(with_config(zephyr, **config), GPU)


def test_on_a_cpu_in_16_bits_the_head_is_copied(small_settings: ModelSettings) -> None:
    """Measured on a model of Qwen2.5's vocabulary: the peak of an evaluation was the weights and that copy."""
    tiny = load_preset("tiny", ["evaluation.prompts=[]"])
    half, full = (
        tiny.model_copy(update={"model": small_settings.model_copy(update={"dtype": dtype})})
        for dtype in ("bfloat16", "float32")
    )
    assert needs(half, CPU).head_copy() == 2 * ModelSpec(small_settings).weights([]).embedding
    assert needs(full, CPU).head_copy() == needs(half, GPU).head_copy() == 0


def test_what_the_c_library_keeps_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load_preset("tiny")
    kept = [need.working for need in planned(tiny, CPU)]
    monkeypatch.setattr(shards, "LARGEST_KEPT", 0)
    plain = [need.working for need in planned(tiny, CPU)]
    assert all(0 < more - less <= 64 * 2**20 for more, less in zip(kept, plain, strict=True))
