"""The RMU loop against a plain computation with two models, and its promises: reproducible, resumable, base untouched."""

import copy
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowmem_rmu.config.schema import Corpus, ModelSettings, Rmu, Topic
from lowmem_rmu.data.corpora import Batch, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, base_only
from lowmem_rmu.model.layers import decoder_layers
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.unlearning import trainer
from lowmem_rmu.unlearning.checkpoint import trainable
from lowmem_rmu.unlearning.steering import unit_vector
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData

CPU = torch.device("cpu")
PAD = 2
TARGET = 3
IDS = torch.arange(5, 37).reshape(2, 16)


def sequences(seed: int, count: int = 6) -> list[list[int]]:
    """Of 4 to 20 tokens, so that there is padding."""
    made = random.Random(seed)
    return [[1, *(made.randrange(3, 300) for _ in range(made.randrange(3, 20)))] for _ in range(count)]


def rmu_of(**changes: Any) -> Rmu:
    settings = {
        "target_layer": TARGET,
        "adapter_layers": [1, 3],
        "rank": 4,
        "batch_size": 2,
        "steps": 6,
        "learning_rate": 0.02,
    }
    return Rmu(**settings | changes)


def topic(**changes: Any) -> Topic:
    return Topic(
        **{
            "corpus": Corpus(source="./nowhere"),
            "alpha": 3.0,
            "steering": "random",
            "steering_coefficient": 6.5,
        }
        | changes
    )


def adaptive(**changes: Any) -> Topic:
    return topic(steering="adaptive", steering_coefficient=None, **changes)


def unlearning_of(
    settings: ModelSettings,
    rmu: Rmu,
    topics: dict[str, Topic] | None = None,
    layers: int | None = TARGET + 1,
    cache_folder: Path | None = None,
) -> Trainer:
    topics = topics or {"bio": topic(), "cyber": topic(alpha=7.0, steering_coefficient=11.0)}
    data = TrainingData(
        {name: sequences(number) for number, name in enumerate(topics)}, sequences(99, 7), PAD
    )
    trained = (
        [f"model.layers.{index}.mlp.down_proj" for index in rmu.adapter_layers]
        if rmu.trainable == "weights"
        else []
    )
    model = add_adapter(load_model(settings, CPU, layers=layers, unquantised=trained), rmu, settings)
    return Trainer(model, rmu, topics, data, cache_folder)


def run(unlearning: Trainer, folder: Path, stop_at: int | None = None) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    finished = unlearning.run(folder, rows.append, lambda: unlearning.progress.step == stop_at)
    return rows, finished


def adapter(unlearning: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(unlearning.model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")}
        for row in rows
    ]


def updated_copy(frozen: PreTrainedModel, model: PeftModel) -> PreTrainedModel:
    """A second full model with the adapter's present weights merged in by hand: W + B A, as lora_alpha is the rank."""
    copied = copy.deepcopy(frozen)
    weights = trainable(model)
    for name in weights:
        if "lora_A" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            copied.model.layers[layer].mlp.down_proj.weight.data += (
                weights[name.replace("lora_A", "lora_B")].detach() @ weights[name].detach()
            )
    return copied


def adapter_gradient_norm(loss: Tensor, updated: PreTrainedModel, model: PeftModel) -> float:
    """By the chain rule from the gradient of the merged weights: of B A it is G A' for B, and B' G for A."""
    weights, parts = trainable(model), []
    for name in weights:
        if "lora_A" in name:
            weight = updated.model.layers[int(name.split(".layers.")[1].split(".")[0])].mlp.down_proj.weight
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            parts += [
                gradient @ weights[name].detach().T,
                weights[name.replace("lora_A", "lora_B")].detach().T @ gradient,
            ]
    return torch.cat([part.flatten() for part in parts]).norm().item()


def target_output(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.layers[TARGET].register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=ids, attention_mask=mask)
    hook.remove()
    return seen[0]


def plain_batch(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    blank = [[PAD] * (longest - len(ids)) for ids in rows]
    marks = [[0] * len(each) for each in blank]
    left = side == "left"
    ids = [(b + row if left else row + b) for b, row in zip(blank, rows, strict=True)]
    mask = [(m + [1] * len(row) if left else [1] * len(row) + m) for m, row in zip(marks, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("padding", ["masked", "paper"])
def test_a_step_computes_what_two_plain_models_give(small_settings: ModelSettings, padding: str) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(padding=padding, shuffle=False, steps=9))
    frozen = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)
    for step in range(6):
        name, turn = ("bio", "cyber")[step % 2], step // 2
        updated, losses, tokens = updated_copy(frozen, unlearning.model), [], 0
        for rows, is_forget in ((unlearning.data.forget[name], True), (unlearning.data.retain, False)):
            ids, mask = plain_batch(
                [rows[(2 * turn + index) % len(rows)] for index in range(2)],
                "left" if padding == "paper" else "right",
            )
            moved = target_output(updated, ids, mask)
            control_vector = (6.5, 11.0)[step % 2] * unit_vector(64, f"0 {name}")
            goal = control_vector.expand_as(moved) if is_forget else target_output(frozen, ids, mask)
            where = torch.ones_like(mask).bool() if padding == "paper" else mask.bool()
            losses.append(mse_loss(moved[where], goal[where].detach()))
            tokens += int(mask.sum())
        forget_loss, retain_loss = losses
        loss = forget_loss + (3.0, 7.0)[step % 2] * retain_loss
        grad_norm = adapter_gradient_norm(loss, updated, unlearning.model)
        row = unlearning.step()
        assert (row["step"], row["topic"]) == (step + 1, name)
        assert row["forget_loss"] == pytest.approx(forget_loss.item(), rel=1e-5)
        assert row["retain_loss"] == pytest.approx(retain_loss.item(), rel=1e-4, abs=1e-9)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
        assert row["tokens"] == tokens
        assert (row["retain_loss"] > 0) == (step > 0)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_first_retain_loss_is_exactly_zero(small_settings: ModelSettings, quantisation: str) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    row = unlearning_of(settings, rmu_of()).step()
    assert row["retain_loss"] == 0.0
    assert row["forget_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["retain_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["grad_norm"] > 0


def test_topics_take_turns(small_settings: ModelSettings, tmp_path: Path) -> None:
    topics = {name: topic() for name in ("bio", "cyber", "chem")}
    rows, finished = run(unlearning_of(small_settings, rmu_of(steps=7), topics), tmp_path / "checkpoint")
    assert finished
    assert [row["topic"] for row in rows] == ["bio", "cyber", "chem", "bio", "cyber", "chem", "bio"]
    assert [row["step"] for row in rows] == list(range(1, 8))


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_loss_falls(small_settings: ModelSettings, tmp_path: Path, quantisation: str) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    rows, _ = run(
        unlearning_of(settings, rmu_of(steps=30), {"bio": adaptive(alpha=1.0)}), tmp_path / "checkpoint"
    )
    first, last = (sum(row["loss"] for row in part) for part in (rows[:3], rows[-3:]))
    assert last < 0.9 * first
    assert rows[-1]["forget_cosine"] < rows[-1]["retain_cosine"]


def test_an_adaptive_coefficient_is_fixed_by_the_first_batch_of_its_topic(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    rmu = rmu_of(shuffle=False)
    unlearning = unlearning_of(small_settings, rmu, {"bio": adaptive(adaptive_scale=4.0)})
    ids, mask = plain_batch(unlearning.data.forget["bio"][:2], "right")
    frozen = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)
    norms = target_output(frozen, ids, mask)[mask.bool()].detach().norm(dim=-1)
    run(unlearning, tmp_path / "checkpoint")
    assert unlearning.progress.coefficients == {"bio": pytest.approx(4 * norms.median().item(), rel=1e-5)}


def test_gradients_are_clipped(small_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(max_grad_norm=0.001))
    norms: list[float] = []
    own = unlearning.optimizer.step

    def step() -> None:
        norms.append(
            torch.stack([parameter.grad.norm() for parameter in trainable(unlearning.model).values()])
            .norm()
            .item()
        )
        own()

    monkeypatch.setattr(unlearning.optimizer, "step", step)
    assert unlearning.step()["grad_norm"] > 0.01  # as it was before
    assert norms == [pytest.approx(0.001, rel=1e-3)]


def test_a_linear_schedule_falls_to_zero_and_a_resumed_run_follows_it(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    def rates(unlearning: Trainer, stop_at: int | None = None) -> list[float]:
        found: list[float] = []
        unlearning.run(
            tmp_path / "checkpoint",
            lambda row: found.append(unlearning.optimizer.param_groups[0]["lr"]),
            lambda: unlearning.progress.step == stop_at,
        )
        return found

    falling = pytest.approx([0.02, 0.015, 0.01, 0.005])
    assert rates(unlearning_of(small_settings, rmu_of(steps=4, schedule="linear"))) == falling
    first = rates(unlearning_of(small_settings, rmu_of(steps=4, schedule="linear")), stop_at=1)
    second = unlearning_of(small_settings, rmu_of(steps=4, schedule="linear"))
    second.restore(tmp_path / "checkpoint")
    assert first + rates(second) == falling
    assert rates(unlearning_of(small_settings, rmu_of(steps=3))) == [0.02] * 3


def test_two_runs_with_one_seed_are_identical(small_settings: ModelSettings, tmp_path: Path) -> None:
    made = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        unlearning = unlearning_of(small_settings, rmu_of(seed=seed))
        made.append((timeless(run(unlearning, tmp_path / "checkpoint")[0]), adapter(unlearning)))
    assert made[0][0] == made[1][0]
    assert same(made[0][1], made[1][1])
    assert made[0][0] != made[2][0]


def test_padding_that_is_added_moves_no_masked_loss(
    small_settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 8, through the whole step."""
    plain, _ = run(unlearning_of(small_settings, rmu_of()), tmp_path / "plain")

    def pad_more(rows: list[list[int]], pad_id: int, side: str, device: torch.device) -> Batch:
        longer = pad([*rows, [pad_id] * 40], pad_id, side, device)
        return Batch(longer.input_ids[:-1], longer.is_token[:-1], None)

    monkeypatch.setattr(trainer, "pad", pad_more)
    padded, _ = run(unlearning_of(small_settings, rmu_of()), tmp_path / "padded")
    assert padded[0]["tokens"] == plain[0]["tokens"]
    for one, other in zip(plain, padded, strict=True):
        for key in ("loss", "forget_loss", "retain_loss", "forget_cosine", "retain_cosine", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_frozen_base_is_unchanged_by_training(
    small_settings: ModelSettings, tmp_path: Path, quantisation: str
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    unlearning = unlearning_of(settings, rmu_of(), layers=None)
    learning = trainable(unlearning.model).keys()
    before = {
        name: parameter.detach().clone()
        for name, parameter in unlearning.model.named_parameters()
        if name not in learning
    }
    base = load_model(settings, CPU)(IDS).logits
    run(unlearning, tmp_path / "checkpoint")
    after = dict(unlearning.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad(), base_only(unlearning.model):
        assert torch.equal(unlearning.model(IDS).logits, base)
    assert not torch.allclose(unlearning.model(IDS).logits, base, atol=1e-3)


def test_activation_checkpointing_changes_no_figure(small_settings: ModelSettings, tmp_path: Path) -> None:
    plain, recomputed = (
        timeless(
            run(
                unlearning_of(small_settings, rmu_of(activation_checkpointing=recompute)),
                tmp_path / str(recompute),
            )[0]
        )
        for recompute in (False, True)
    )
    assert plain == recomputed


def test_a_loss_that_is_not_finite_ends_the_run_before_it_harms_the_adapter(
    small_settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "check_scale", lambda *_: None)  # which refuses such a vector first
    endless = topic().model_copy(update={"steering_coefficient": 1e30})  # which a preset cannot say
    unlearning = unlearning_of(small_settings, rmu_of(checkpoint_every=1), {"bio": topic(), "cyber": endless})
    unlearning.step()
    before, moments = adapter(unlearning), copy.deepcopy(unlearning.optimizer.state_dict())
    with pytest.raises(UserError) as raised:
        run(unlearning, tmp_path / "checkpoint")
    text = str(raised.value)
    assert "The loss is no longer finite at step 2." in text
    assert "Lower rmu.learning_rate, or a topic's steering_coefficient; the last checkpoint is kept." in text
    assert same(adapter(unlearning), before)
    assert str(unlearning.optimizer.state_dict()) == str(moments)
    assert unlearning.progress.step == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("step", [3, 4, 6])
def test_weights_that_are_not_finite_are_neither_kept_nor_taken_for_an_adapter(
    small_settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, step: int
) -> None:
    """The loss shows them one step later only: they are looked at with every checkpoint (here every second step), and after the last."""
    unlearning = unlearning_of(small_settings, rmu_of(checkpoint_every=2))
    monkeypatch.setattr(trainer.Trainer, "_check_losses", lambda *_: None)

    def spoil(row: dict[str, Any]) -> None:
        if row["step"] == step:
            next(iter(trainable(unlearning.model).values())).data[0, 0] = bad

    with pytest.raises(UserError) as raised:
        unlearning.run(tmp_path, spoil, lambda: False)
    found_at = step + step % 2
    assert str(raised.value).startswith(
        f"The trained weights are no longer finite after step {found_at}.\nLower rmu.learning_rate"
    )
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == found_at - 2
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


def test_weights_are_looked_at_after_a_last_step_without_a_checkpoint(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(steps=1))
    with pytest.raises(UserError, match="The trained weights are no longer finite after step 1"):
        unlearning.run(
            tmp_path,
            lambda row: next(iter(trainable(unlearning.model).values())).data.fill_(math.inf),
            lambda: False,
        )
    assert not any(tmp_path.iterdir())


def test_activations_that_explode_end_the_run(small_settings: ModelSettings, tmp_path: Path) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(checkpoint_every=1, learning_rate=1.0, steps=20))
    with pytest.raises(UserError) as raised:
        run(unlearning, tmp_path / "checkpoint")
    pattern = r"Activations explode at step (\d+): on the retain set they are \d+ times as large as the base model's\.\nLower rmu\.learning_rate"
    found = re.match(pattern, str(raised.value))
    assert found
    assert unlearning.progress.step == int(found[1]) - 1
    resumed = unlearning_of(small_settings, rmu_of(checkpoint_every=1, learning_rate=1.0, steps=20))
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.progress.step == unlearning.progress.step


def test_a_control_vector_of_another_scale_is_refused_in_the_first_step(
    small_settings: ModelSettings,
) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(), {"bio": topic(steering_coefficient=1e7)})
    before = adapter(unlearning)
    with pytest.raises(
        UserError,
        match=r"The control vector of bio is 1e\+07 long, but activations at the target layer have a norm of",
    ):
        unlearning.step()
    assert same(adapter(unlearning), before)


def test_contrastive_steering_aims_from_expert_to_novice(small_settings: ModelSettings) -> None:
    contrastive = topic(steering="contrastive", steering_coefficient=0.7)
    novice, expert = [1, 9, 30, 40], [1, 9, 50, 60, 70]
    data = TrainingData({"bio": sequences(0)}, sequences(99, 7), PAD, {"bio": [novice, expert]})
    model = add_adapter(load_model(small_settings, CPU, layers=TARGET + 1), rmu_of(), small_settings)
    row = Trainer(model, rmu_of(shuffle=False), {"bio": contrastive}, data).step()
    frozen = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)
    ends = [
        target_output(frozen, torch.tensor([ids]), torch.ones(1, len(ids)))[0, -1].detach()
        for ids in (novice, expert)
    ]
    # At the first step updated is frozen, so the loss is the size of the move alone: 0.7 times a vector of length 1.
    difference = ends[0] - ends[1]
    assert row["forget_loss"] == pytest.approx(
        (0.7 * difference / difference.norm()).square().mean().item(), rel=1e-4
    )


CACHES = [{"cache_gib": 0.0}, {"cache_gib": 1.0}, {"cache_gib": 1.0, "cache_in": "disk"}, {"cache_gib": 2e-5}]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_cache_changes_no_bit(
    small_settings: ModelSettings, tmp_path: Path, quantisation: str, shuffle: bool
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    made = []
    for number, cache in enumerate(CACHES):
        unlearning = unlearning_of(
            settings, rmu_of(steps=16, shuffle=shuffle, **cache), cache_folder=tmp_path / str(number)
        )
        made.append(
            (
                timeless(run(unlearning, tmp_path / "checkpoint")[0]),
                adapter(unlearning),
                len(unlearning.cache.keys()),
            )
        )
    assert all(rows == made[0][0] and same(weights, made[0][1]) for rows, weights, _ in made)
    kept = [count for *_, count in made]
    assert kept[0] == 0
    assert kept[1] == kept[2] == 3 + 3 + 4  # every distinct batch of two topics and of the retain set
    assert 0 < kept[3] < kept[1]
    assert len(list((tmp_path / "2").iterdir())) == kept[2]


def test_with_a_warm_cache_no_lower_layer_runs_and_no_frozen_path(small_settings: ModelSettings) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(steps=30, shuffle=False))
    calls: Counter[int] = Counter()
    for index, layer in enumerate(decoder_layers(unlearning.model)):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.update([index]))
    counts = []
    for _ in range(9):
        calls.clear()
        unlearning.step()
        counts.append([calls[index] for index in range(TARGET + 1)])
    # A forget and a retain batch, each frozen (of the forget batch one sample) and updated.
    assert counts[0] == [
        2,
        4,
        4,
        4,
    ]
    assert counts[1] == [1, 3, 3, 3]  # in the paper's order this topic shares the retain batch
    assert counts[8] == [0, 2, 2, 2]  # the second epoch


def test_what_never_comes_again_is_not_kept(small_settings: ModelSettings) -> None:
    unlearning = unlearning_of(small_settings, rmu_of(steps=3), {"bio": topic()})
    for _ in range(3):
        unlearning.step()
    assert unlearning.cache.keys() == []


@pytest.mark.parametrize("kind", ["lora", "weights"])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_whole_matrices_are_trained_as_well(
    small_settings: ModelSettings, tmp_path: Path, quantisation: str, kind: str
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    rmu = rmu_of(trainable=kind, steps=30, learning_rate={"lora": 0.02, "weights": 0.005}[kind])
    unlearning = unlearning_of(settings, rmu, {"bio": adaptive(alpha=1.0)})
    rows, _ = run(unlearning, tmp_path / "checkpoint")
    assert rows[0]["retain_loss"] == 0.0
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_stop_ends_with_a_checkpoint(small_settings: ModelSettings, tmp_path: Path) -> None:
    rows, finished = run(
        unlearning_of(small_settings, rmu_of(cache_gib=0.0)), tmp_path / "checkpoint", stop_at=2
    )
    assert not finished
    assert len(rows) == 2
    with safe_open(tmp_path / "checkpoint/state.safetensors", framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress == {"step": 2, "coefficients": {"bio": 6.5, "cyber": 11.0}, "cached": [], "checks": []}


def test_a_stop_at_the_last_step_comes_too_late(small_settings: ModelSettings, tmp_path: Path) -> None:
    rows, finished = run(unlearning_of(small_settings, rmu_of()), tmp_path / "checkpoint", stop_at=6)
    assert finished
    assert len(rows) == 6


def test_checkpoints_are_made_as_often_as_asked(
    small_settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        trainer,
        "save_checkpoint",
        lambda folder, model, optimizer, progress, settings: made.append(progress.step),
    )
    run(unlearning_of(small_settings, rmu_of(steps=7, checkpoint_every=3)), tmp_path / "checkpoint")
    assert made == [3, 6]


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(
    small_settings: ModelSettings, tmp_path: Path, quantisation: str, stop_at: int
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    topics = {"bio": adaptive(), "cyber": adaptive()}
    whole, halted, resumed = (unlearning_of(settings, rmu_of(), topics) for _ in range(3))
    rows, _ = run(whole, tmp_path / "whole")
    first, _ = run(halted, tmp_path / "checkpoint", stop_at=stop_at)
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.progress.step == stop_at
    second, finished = run(resumed, tmp_path / "checkpoint")
    assert finished
    assert timeless(first + second) == timeless(rows)
    assert same(adapter(resumed), adapter(whole))


def test_a_restore_without_a_checkpoint_starts_at_the_beginning(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, rmu_of())
    unlearning.restore(tmp_path / "nothing")
    assert unlearning.step()["step"] == 1
