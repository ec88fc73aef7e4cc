"""The guard: what it measures, which point it keeps, and when it ends a run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.schema import Corpus, ModelSettings, Rmu, Topic
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.unlearning.checkpoint import BestWeights, trainable
from lowmem_rmu.unlearning.guard import (
    Check,
    Guard,
    GuardData,
    Kind,
    best_of,
    collapse,
    has_collapsed,
    is_too_far,
    letter_share,
)
from lowmem_rmu.unlearning.losses import SINK_RATIO
from lowmem_rmu.unlearning.trainer import Trainer, TrainingData

CPU = torch.device("cpu")
TEXTS = [[1, *range(start, start + 12 + start % 3)] for start in range(20, 60, 8)]
QUESTIONS = [[1, *range(start, start + 7 + start % 4)] for start in range(100, 130, 6)]
OTHERS = [[1, *range(start, start + 10)] for start in range(200, 260, 12)]
LETTERS = [40, 41, 42, 43]
RMU = Rmu(
    target_layer=2, adapter_layers=[1, 2], rank=4, batch_size=2, steps=12, learning_rate=0.02, guard_every=3
)


def check(step: int, damage: float, distance: float, **more: Any) -> Check:
    return Check(step, damage, 0.0, distance, distance, **more)


def data(**changes: Any) -> GuardData:
    kinds = {"retain": Kind(TEXTS, QUESTIONS), "topics": {"bio": Kind(OTHERS, QUESTIONS)}, "letters": LETTERS}
    return GuardData(**kinds | changes)


def unlearning_of(
    settings: ModelSettings,
    guard: GuardData | None,
    alpha: float = 3.0,
    layers: int | None = None,
    **changes: Any,
) -> Trainer:
    """With `layers`, only the first ones are loaded."""
    rmu = RMU.model_copy(update=changes)
    topic = Topic(corpus=Corpus(source="./nowhere"), alpha=alpha, adaptive_scale=3.0)
    model = add_adapter(load_model(settings, CPU, layers), rmu, settings)
    return Trainer(
        model,
        rmu,
        {"bio": topic},
        TrainingData({"bio": OTHERS}, TEXTS, 2, guard=guard, is_whole=layers is None),
    )


def run(unlearning: Trainer, folder: Path, stop_at: int | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    unlearning.run(folder, rows.append, lambda: unlearning.progress.step == stop_at)
    return rows


def test_an_untrained_adapter_has_not_moved(small_settings: ModelSettings) -> None:
    found = Guard(unlearning_of(small_settings, None).model, data(), 2).check(0)
    figures = (found.retain_kl, found.question_kl, found.topic_kl, found.topic_question_kl)
    assert figures == pytest.approx((0, 0, 0, 0), abs=1e-6)
    assert found.letters == found.base_letters
    assert len(found.letters) == len(QUESTIONS)


def test_it_measures_what_two_whole_models_give(small_settings: ModelSettings, tmp_path: Path) -> None:
    unlearning = unlearning_of(small_settings, None)
    run(unlearning, tmp_path)
    found = Guard(unlearning.model, data(), 2).check(12)
    base = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)

    def divergences(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            before, after = (
                model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (base, unlearning.model)
            )
        return kl_div(after, before, reduction="none", log_target=True).sum(-1)

    texts = torch.cat([divergences(ids)[:-1] for ids in TEXTS])
    questions = torch.stack([divergences(ids)[-1] for ids in QUESTIONS])
    assert found.retain_kl == pytest.approx(texts.mean().item(), rel=1e-3)
    assert found.question_kl == pytest.approx(questions.mean().item(), rel=1e-3)
    assert found.topic_question_kl == pytest.approx(found.question_kl)  # the same questions
    assert found.topic_kl > 0
    with torch.no_grad():
        answers = [
            unlearning.model(torch.tensor([ids])).logits[0, -1, LETTERS].argmax().item() for ids in QUESTIONS
        ]
    assert found.letters == "".join("ABCD"[int(index)] for index in answers)
    for model, share in ((unlearning.model, found.top_share), (base, found.base_top_share)):
        with torch.no_grad():
            predicted = [
                int(token) for ids in TEXTS for token in model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
            ]
        assert share == pytest.approx(Counter(predicted).most_common(1)[0][1] / len(predicted))


def test_shifts_are_measured_without_the_upper_layers(small_settings: ModelSettings, tmp_path: Path) -> None:
    """What the target layer of the whole model gives, with the adapter on and off."""
    unlearning = unlearning_of(small_settings, data(), layers=3)
    rows = run(unlearning, tmp_path)
    assert [row["step"] for row in rows if "retain_shift" in row] == [3, 6, 9, 12]
    found = unlearning.progress.checks[-1]
    assert found.unit == "shift"
    base = AutoModelForCausalLM.from_pretrained(small_settings.name, dtype=torch.float32)

    def shifts(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            frozen = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
            trunk = run_trunk(unlearning.model, torch.tensor([ids]), None, unlearning.updated_layers)
            moved = run_layers(unlearning.model, trunk, unlearning.updated_layers)[0]
        norms = frozen.norm(dim=-1)
        ordinary = norms <= SINK_RATIO * norms.nanmedian()
        return ((moved - frozen).norm(dim=-1) / norms)[ordinary]

    assert found.retain_kl == pytest.approx(torch.cat([shifts(ids) for ids in TEXTS]).mean().item(), rel=1e-3)
    assert found.topic_kl == pytest.approx(torch.cat([shifts(ids) for ids in OTHERS]).mean().item(), rel=1e-3)
    assert found.question_kl == pytest.approx(
        torch.cat([shifts(ids) for ids in QUESTIONS]).mean().item(), rel=1e-3
    )


def test_a_shift_has_bounds_and_a_limit_of_its_own(small_settings: ModelSettings, tmp_path: Path) -> None:
    checks = [
        check(10, 0.1, 0.9, unit="shift"),
        check(20, 0.2, 1.3, unit="shift"),
        check(30, 0.1, 2.4, unit="shift"),
    ]
    assert best_of(checks, 0.25) == checks[2], "both are far enough: the one with less damage"
    assert best_of(checks[:2], 0.15) == checks[0]
    assert has_collapsed([check(10, 1.1, 2.0, unit="shift")] * 2, 0.25)
    assert not has_collapsed([check(10, 1.1, 2.0)] * 2, 0.25), "in nats that is 10 times the limit"
    unlearning = unlearning_of(small_settings, data(), layers=3, guard_shift_limit=3.0)
    run(unlearning, tmp_path)
    assert unlearning.limit == 3.0
    assert "of the activations' own size" in str(unlearning.outcome)


def test_of_several_topics_the_one_that_moved_least_counts(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, None)
    run(unlearning, tmp_path)
    alone = [
        Guard(unlearning.model, data(topics={"one": Kind(texts)}), 2).check(12).topic_kl
        for texts in (TEXTS, OTHERS)
    ]
    both = Guard(unlearning.model, data(topics={"one": Kind(TEXTS), "other": Kind(OTHERS)}), 2).check(12)
    assert both.topic_kl == pytest.approx(min(alone), rel=1e-5)
    assert both.topic_question_kl is None


def test_the_best_point_has_the_topic_farthest_and_the_rest_within_the_limit() -> None:
    checks = [check(10, 0.01, 0.2), check(20, 0.2, 1.8), check(30, 0.1, 1.0), check(40, 0.9, 8.0)]
    assert best_of(checks, 0.3) == checks[1]
    assert best_of(checks, 0.15) == checks[2]
    assert best_of(checks, 0.05) is None  # the topic has hardly moved there
    assert best_of([], 0.3) is None


def test_among_points_with_the_topic_far_enough_the_least_damage_is_best() -> None:
    checks = [check(10, 0.2, 9.0), check(20, 0.1, 2.5), check(30, 0.05, 1.9), check(40, 0.15, 12.0)]
    assert best_of(checks, 0.3) == checks[1]


def test_damage_is_that_of_text_or_of_questions() -> None:
    assert Check(1, 0.1, 0.7, 2.0, 4.0).damage == 0.7
    assert Check(1, 0.1, None, 2.0, None).damage == 0.1
    # A topic is as far away as the kind that has moved less.
    assert Check(1, 0.1, 0.7, 2.0, 4.0).distance == 2.0
    assert Check(1, 0.1, 0.7, 4.0, 2.0).distance == 2.0
    assert Check(1, 0.1, None, 2.0, None).distance == 2.0


def test_one_check_beyond_the_limit_ends_nothing() -> None:
    assert not is_too_far([check(10, 0.9, 1.0)], 0.3)
    assert not is_too_far([check(10, 0.9, 1.0), check(20, 0.1, 1.0)], 0.3)
    assert is_too_far([check(10, 0.1, 1.0), check(20, 0.9, 1.0), check(30, 0.4, 1.0)], 0.3)


def test_a_collapse_is_one_letter_or_a_divergence_that_runs_away() -> None:
    mixed, same = {"base_letters": "ABCD", "letters": "ABCD"}, {"base_letters": "ABCD", "letters": "AAAA"}
    assert not has_collapsed([check(10, 0.4, 1.0, **mixed)] * 2, 0.3)
    assert has_collapsed([check(10, 0.1, 1.0, **same)] * 2, 0.3)
    assert not has_collapsed([check(10, 0.1, 1.0, **mixed), check(20, 0.1, 1.0, **same)], 0.3)
    assert has_collapsed([check(10, 3.1, 1.0, **mixed)] * 2, 0.3)
    # One token at most positions, unless base does so too.
    assert has_collapsed([check(10, 0.1, 1.0, top_share=0.7, base_top_share=0.1)] * 2, 0.3)
    assert not has_collapsed([check(10, 0.1, 1.0, top_share=0.7, base_top_share=0.3)] * 2, 0.3)
    assert not has_collapsed([check(10, 0.1, 1.0, top_share=0.4, base_top_share=0.1)] * 2, 0.3)
    # Where base itself answers one or two letters, one letter says nothing.
    assert not has_collapsed([check(10, 0.1, 1.0, base_letters="AAAB", letters="AAAA")] * 2, 0.3)


def test_letters_are_counted() -> None:
    assert letter_share("ABAC") == "A 2, B 1, C 1"


def test_checks_come_as_often_as_asked_and_after_the_last_step(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    rows = run(unlearning_of(small_settings, data(), steps=8, guard_limit=100.0), tmp_path)
    assert [row["step"] for row in rows if "retain_kl" in row] == [3, 6, 8]
    assert all(row["topic_kl"] > 0 for row in rows if "topic_kl" in row)
    assert json.loads(json.dumps(rows)) == rows
    assert not any(
        "retain_kl" in row for row in run(unlearning_of(small_settings, None, steps=4), tmp_path / "none")
    )
    assert not any(
        "retain_kl" in row
        for row in run(unlearning_of(small_settings, data(), steps=4, guard_every=0), tmp_path / "off")
    )


def weights(unlearning: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainable(unlearning.model).items()}


def scripted(
    unlearning: Trainer, found: dict[int, tuple[float, float]]
) -> dict[int, dict[str, torch.Tensor]]:
    """Let the guard find `(damage, distance)` by step; return what the weights were at each check, filled in as they come."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def look(step: int) -> Check:
        seen[step] = weights(unlearning)
        return check(step, *found[step])

    assert unlearning.guard is not None
    unlearning.guard.check = look  # type: ignore[method-assign]
    return seen


def test_training_ends_beyond_the_limit_and_the_best_weights_come_back(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3)
    seen = scripted(unlearning, {3: (0.1, 1.5), 6: (0.5, 9.0), 9: (0.6, 9.0)})
    rows = run(unlearning, tmp_path)
    assert len(rows) == 9  # of 12
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in trainable(unlearning.model).items())
    assert any(not torch.equal(tensor, seen[9][name]) for name, tensor in trainable(unlearning.model).items())
    assert unlearning.outcome is not None
    assert unlearning.outcome.startswith(
        "Training ended 3 steps early: text and questions that are to stay are too far from base. "
        "The weights after step 3 of 9 are kept: the topic diverges from base by 1.50 nats"
    )


def test_training_ends_once_the_topic_is_far(small_settings: ModelSettings, tmp_path: Path) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3)
    seen = scripted(unlearning, {3: (0.1, 1.9), 6: (0.2, 2.1)})
    assert len(run(unlearning, tmp_path)) == 6  # of 12
    assert all(torch.equal(tensor, seen[6][name]) for name, tensor in trainable(unlearning.model).items())
    assert str(unlearning.outcome).startswith(
        "Training ended 6 steps early: the topic is far from base. The weights after step 6 of 6 are kept"
    )


def test_a_far_topic_ends_nothing_while_the_rest_is_too_far(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3)
    scripted(unlearning, {3: (0.1, 1.0), 6: (0.4, 2.1), 9: (0.1, 1.2), 12: (0.1, 1.1)})
    assert len(run(unlearning, tmp_path)) == 12


def test_a_better_point_before_the_last_step_comes_back(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3)
    seen = scripted(unlearning, {3: (0.1, 1.2), 6: (0.2, 1.9), 9: (0.1, 1.0), 12: (0.4, 9.0)})
    assert len(run(unlearning, tmp_path)) == 12
    assert all(torch.equal(tensor, seen[6][name]) for name, tensor in trainable(unlearning.model).items())


def test_without_a_good_point_the_last_weights_stay_and_it_is_said(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3)
    seen = scripted(unlearning, {3: (0.4, 2.0), 6: (0.5, 4.0), 9: (0.4, 4.0), 12: (0.4, 9.0)})
    assert len(run(unlearning, tmp_path)) == 12
    assert all(torch.equal(tensor, seen[12][name]) for name, tensor in trainable(unlearning.model).items())
    assert str(unlearning.outcome).startswith(
        "The guard found no point with the topic far from base and the rest within 0.3 nats"
    )


def test_a_collapse_ends_the_run_with_a_sentence(small_settings: ModelSettings, tmp_path: Path) -> None:
    """For real: no retain loss, and a target far away."""
    unlearning = unlearning_of(
        small_settings, data(), alpha=0.0, guard_limit=0.001, steps=60, learning_rate=0.05
    )
    with pytest.raises(
        UserError,
        match=r"The model has collapsed by step \d+: .*found no better point before\.\nLower rmu\.learning_rate",
    ):
        run(unlearning, tmp_path)
    assert unlearning.progress.step < 60


def test_one_letter_is_named() -> None:
    said = collapse(check(20, 0.1, 1.0, base_letters="ABCDA", letters="BBBBB"))
    assert said.startswith(
        "The model has collapsed by step 20: it answers B to every question about text that is to stay (base: A 2, B 1, C 1, D 1)"
    )


def test_one_token_over_and_over_is_named() -> None:
    said = collapse(check(20, 0.1, 1.0, top_share=0.83, base_top_share=0.08))
    assert "at 83% of the positions of text that is to stay it predicts the same token (base: 8%)" in said


@pytest.mark.parametrize("stop_at", [4, 7, 10])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(
    small_settings: ModelSettings, tmp_path: Path, stop_at: int
) -> None:
    whole = unlearning_of(small_settings, data(), guard_limit=0.5)
    rows = run(whole, tmp_path / "whole")
    first = unlearning_of(small_settings, data(), guard_limit=0.5)
    before = run(first, tmp_path / "parts", stop_at)
    second = unlearning_of(small_settings, data(), guard_limit=0.5)
    second.restore(tmp_path / "parts")
    after = run(second, tmp_path / "parts")
    assert second.progress.checks == whole.progress.checks
    assert len(before) + len(after) == len(rows)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(second).items())


def test_only_the_best_weights_are_kept_with_a_checkpoint(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    unlearning = unlearning_of(small_settings, data(), guard_limit=0.3, checkpoint_every=7)
    scripted(unlearning, {3: (0.1, 1.2), 6: (0.1, 1.4), 9: (0.1, 1.5), 12: (0.1, 1.0)})
    run(unlearning, tmp_path, stop_at=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-6.safetensors", "state.safetensors"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        lambda content: content[:40],
        lambda content: b"",
    ],
)
def test_damaged_best_weights_are_refused(tmp_path: Path, spoil: Any) -> None:
    best = BestWeights(tmp_path / "checkpoint")
    there = {"a": torch.arange(12.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    best.save(10, there)
    back = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
    best.restore(10, back)
    assert all(torch.equal(back[name], there[name]) for name in there)
    path = best.path(10)
    path.write_bytes(spoil(path.read_bytes()))
    for tensor in back.values():
        tensor.zero_()
    with pytest.raises(UserError, match=r"best-10\.safetensors is damaged"):
        best.restore(10, back)
    path.unlink()
    with pytest.raises(UserError, match=r"best-10\.safetensors is damaged"):
        best.restore(10, back)
    assert all(not tensor.any() for tensor in back.values())


def test_a_check_is_what_a_checkpoint_brings_back() -> None:
    made = replace(check(3, 0.123456789012345, 2.0), letters="ABCD", base_letters="ABCC")
    assert Check(**json.loads(json.dumps(made.__dict__))) == made
