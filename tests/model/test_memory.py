"""The memory plan against real storage."""

import sys
from mmap import mmap
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from lowmem_rmu.errors import UserError
from lowmem_rmu.model import memory
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.loading import describe_weights, load_config, load_model
from lowmem_rmu.model.memory import NF4_BYTES, StageNeed, count_weights, gib, memory_available, memory_in_use, plan, reset_peak
from lowmem_rmu.presets import ModelSettings, Preset, Rmu, load_preset
from lowmem_rmu.runs import STAGES

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def zephyr(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The shipped preset; whoever asks for the model's own configuration would need the network."""

    def no_network(_: ModelSettings) -> None:
        raise AssertionError("the plan asked for the model")

    monkeypatch.setattr(memory, "load_config", no_network)
    return load_preset("zephyr-7b")


def changed(preset: Preset, **rmu: Any) -> Preset:
    return preset.model_copy(update={"rmu": preset.rmu.model_copy(update=rmu)})


def unlearn_need(preset: Preset, whole_model: bool = True) -> StageNeed:
    return next(need for need in plan(preset, GPU, STAGES if whole_model else ["unlearn"]) if need.stage == "unlearn")


def test_weights_are_counted_as_the_model_has_them(small_settings: ModelSettings) -> None:
    model = load_model(small_settings, CPU)
    weights = count_weights(load_config(small_settings), ["down_proj", "q_proj"])
    assert weights.total() + model.model.norm.weight.numel() == sum(parameter.numel() for parameter in model.parameters())
    assert weights.layers == 6
    assert weights.layer_linear == 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert weights.layer_other == 2 * 64
    assert weights.largest_linear == 64 * 128
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], rank=5)
    assert weights.learning(rmu) == 2 * 5 * ((128 + 64) + (64 + 64))
    assert weights.learning(rmu.model_copy(update={"trainable": "weights"})) == 2 * (128 * 64 + 64 * 64)


def test_experts_are_counted_with_their_adapters(mixtral_settings: ModelSettings) -> None:
    model = load_model(mixtral_settings, CPU)
    weights = count_weights(load_config(mixtral_settings), ["down_proj"])
    assert weights.total() + model.model.norm.weight.numel() == describe_weights(model)["weights"]
    assert weights.layers * weights.layer_linear == describe_weights(model)["in_4bit"]
    assert weights.experts == 4 * (2 * 128 * 64 + 64 * 128)
    assert weights.largest_linear == 4 * 2 * 128 * 64
    rmu = Rmu(target_layer=3, adapter_layers=[1, 3], modules=["down_proj"], rank=5)
    adapted = add_adapter(model, rmu, mixtral_settings)
    assert weights.learning(rmu) == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def test_dequantised_experts_that_the_backward_pass_needs_are_planned_for(mixtral_settings: ModelSettings) -> None:
    """Counted as autograd counts: for every updated layer but the first, whose input takes no gradient."""
    zephyr, rmu = load_preset("zephyr-7b"), Rmu(target_layer=3, adapter_layers=[1, 3], modules=["down_proj"], rank=5, batch_size=1)
    model, updated, kept = add_adapter(load_model(mixtral_settings, CPU), rmu, mixtral_settings), slice(1, 4), dict[int, int]()

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.numel() >= 4 * 64 * 128:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        run_layers(model, run_trunk(model, torch.arange(5, 21)[None], None, updated), updated)
    topics = {name: topic.model_copy(update={"max_tokens": 2}) for name, topic in zephyr.topics.items()}  # next to no activations
    retain = zephyr.retain.model_copy(update={"max_tokens": 2})
    small = zephyr.model_copy(update={"rmu": rmu, "topics": topics, "retain": retain, "model": mixtral_settings})
    planned = unlearn_need(small).working - unlearn_need(changed(small, activation_checkpointing=True)).working
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)


def test_tied_embeddings_are_counted_once(small_settings: ModelSettings) -> None:
    config = load_config(small_settings)
    untied = count_weights(config, ["down_proj"])
    config.tie_word_embeddings = True
    tied = count_weights(config, ["down_proj"])
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


@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"batch_size": 2}, {"rank": 4}, {"adapter_layers": [7]}], ids=str)
def test_settings_that_save_memory_lower_the_plan(zephyr: Preset, change: dict[str, Any]) -> None:
    assert unlearn_need(changed(zephyr, **change)).working < unlearn_need(zephyr).working


def test_a_smaller_evaluation_batch_lowers_the_plan(zephyr: Preset) -> None:
    smaller = zephyr.model_copy(update={"evaluation": zephyr.evaluation.model_copy(update={"batch_tokens": 1024})})
    assert plan(smaller, GPU)[0].working < plan(zephyr, GPU)[0].working


def test_the_plan_of_a_7b_model_needs_no_network_and_is_plausible(zephyr: Preset) -> None:
    base, _, unlearned = plan(zephyr, GPU)
    unlearn = unlearn_need(zephyr, whole_model=False)
    assert [need.stage for need in plan(zephyr, GPU)] == ["evaluate-base", "unlearn", "evaluate-unlearned"]
    assert unlearn.weights < 1.5 * 2**30
    assert 3.5 * 2**30 < base.weights < 4.5 * 2**30  # 7.2 billion weights at 4.13 bits, embeddings and head in bfloat16
    assert unlearned.weights - base.weights == 3 * 16 * (14336 + 4096) * 4
    assert all(need.working < 8 * 2**30 for need in (base, unlearn, unlearned))


def test_the_plan_follows_quantisation(zephyr: Preset) -> None:
    plain = zephyr.model_copy(update={"model": zephyr.model.model_copy(update={"quantisation": "none"})})
    weights = plan(plain, GPU)[0].weights
    assert weights == pytest.approx(7.24e9 * 2, rel=0.01)


def test_a_preset_without_a_shape_is_planned_from_the_model(zephyr: Preset, small_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "load_config", load_config)
    small = changed(zephyr, target_layer=5).model_copy(update={"model": small_settings})
    assert plan(small, CPU)[0].weights == (count_weights(load_config(small_settings), []).total()) * 4


def test_a_target_layer_beyond_the_model_is_refused_by_the_plan(zephyr: Preset) -> None:
    with pytest.raises(UserError, match=r"rmu\.target_layer is 32, but the model has 32 layers"):
        plan(changed(zephyr, target_layer=32), GPU)


def test_the_cache_is_planned_where_it_is_kept(zephyr: Preset) -> None:
    on_cpu = {need.stage: need for need in plan(zephyr, CPU)}
    assert on_cpu["unlearn"].cache == 2**30  # the budget: there is more to keep
    assert on_cpu["evaluate-base"].cache == unlearn_need(zephyr).cache == 0  # a GPU's memory holds none of it
    assert next(need.cache for need in plan(changed(zephyr, cache_in="disk"), CPU, ["unlearn"])) == 0


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


@pytest.mark.parametrize(("size", "text"), [(3 * 2**30, "3.00 GiB"), (2**28, "0.25 GiB"), (2**28 - 1, "256 MiB"), (5 * 2**20, "5 MiB")])
def test_sizes_are_printed_in_gib_or_mib(size: int, text: str) -> None:
    assert gib(size) == text
