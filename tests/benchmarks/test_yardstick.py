"""The engine computes what the paper's algorithm computes: step by step against the plain transcription, unquantised."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.yardstick import Padded, Yardstick
from lowmem_rmu.config.schema import Corpus, ModelSettings, Rmu, Topic
from lowmem_rmu.model.adapters import add_adapter, trained_modules
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.unlearning.checkpoint import trainable
from lowmem_rmu.unlearning.steering import unit_vector
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData

STEPS, LAYERS, TARGET, ALPHA, COEFFICIENT, RATE = 20, [2, 3], 3, 30.0, 6.5, 1e-3
PAD = 2


def ragged(seed: int, count: int) -> list[list[int]]:
    lengths = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, 300, (int(torch.randint(8, 40, (), generator=lengths)),), generator=lengths).tolist()
        for _ in range(count)
    ]


FORGET, RETAIN = {"bio": ragged(1, 22), "cyber": ragged(2, 22)}, ragged(3, 22)


def left_padded(rows: list[list[int]]) -> Padded:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return Padded(ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]))


def follow_the_paper(
    settings: ModelSettings, steps: int
) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]:
    """The yardstick's losses a step, and its matrices before and after."""
    frozen = AutoModelForCausalLM.from_pretrained(settings.name, dtype=torch.float32)
    yardstick = Yardstick(copy.deepcopy(frozen), frozen, LAYERS, TARGET, RATE)
    before = {name: matrix.detach().clone() for name, matrix in yardstick.matrices.items()}
    losses = []
    for step in range(steps):
        name, rows = ("bio", "cyber")[step % 2], slice(2 * (step // 2), 2 * (step // 2) + 2)
        vector = COEFFICIENT * unit_vector(frozen.config.hidden_size, f"0 {name}")
        losses.append(
            yardstick.step(left_padded(FORGET[name][rows]), left_padded(RETAIN[rows]), vector, ALPHA)
        )
    return losses, before, {name: matrix.detach() for name, matrix in yardstick.matrices.items()}


def engine(settings: ModelSettings, **changes: Any) -> Trainer:
    rmu = Rmu(
        **{
            "target_layer": TARGET,
            "adapter_layers": LAYERS,
            "batch_size": 2,
            "steps": STEPS,
            "shuffle": False,
            "padding": "paper",
            "learning_rate": RATE,
            "max_grad_norm": None,
        }
        | changes
    )
    model = load_model(settings, torch.device("cpu"), layers=TARGET + 1)
    model = load_model(settings, torch.device("cpu"), TARGET + 1, trained_modules(model, rmu))
    topic = Topic(
        corpus=Corpus(source="./nowhere"), alpha=ALPHA, steering="random", steering_coefficient=COEFFICIENT
    )
    return Trainer(
        add_adapter(model, rmu, settings),
        rmu,
        dict.fromkeys(FORGET, topic),
        TrainingData(FORGET, RETAIN, PAD),
    )


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"cache_gib": 0.0}], ids=str)
def test_twenty_steps_on_whole_matrices_follow_the_yardstick(
    small_settings: ModelSettings, changes: dict[str, Any]
) -> None:
    losses, before, after = follow_the_paper(small_settings, STEPS)
    unlearning = engine(small_settings, trainable="weights", **changes)
    for step, (forget_loss, retain_loss) in enumerate(losses):
        row = unlearning.step()
        assert row["forget_loss"] == pytest.approx(forget_loss, rel=1e-4)
        assert row["retain_loss"] == (pytest.approx(retain_loss, rel=1e-4) if step else 0.0)
    learned = trainable(unlearning.model).items()
    matrices = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): matrix
        for name, matrix in learned
    }
    assert matrices.keys() == after.keys()
    for name, matrix in matrices.items():
        moved = (after[name] - before[name]).norm()
        assert moved > 0.01 * before[name].norm()
        assert (matrix - after[name]).norm() < 1e-4 * moved


def test_with_lora_the_first_step_has_the_yardsticks_losses(small_settings: ModelSettings) -> None:
    ((forget_loss, _),), _, _ = follow_the_paper(small_settings, 1)
    row = engine(small_settings).step()
    assert row["forget_loss"] == pytest.approx(forget_loss, rel=1e-5)
    assert row["retain_loss"] == 0.0


def test_the_yardstick_would_notice_another_algorithm(small_settings: ModelSettings) -> None:
    """The comparison can fail: padding that does not count, or gradients that are clipped, end elsewhere."""
    losses, *_ = follow_the_paper(small_settings, STEPS)
    for changes in ({"padding": "masked"}, {"max_grad_norm": 0.01}):
        unlearning = engine(small_settings, trainable="weights", **changes)
        rows = [unlearning.step() for _ in losses]
        assert any(
            row["forget_loss"] != pytest.approx(forget, rel=1e-4)
            for row, (forget, _) in zip(rows, losses, strict=True)
        )
