"""Targets: direction and length, a way of steering at a time."""

import math
import re
from typing import Any

import pytest
import torch

from lowmem_rmu.config.schema import Corpus, Rmu, Topic
from lowmem_rmu.errors import UserError
from lowmem_rmu.unlearning.steering import check_scale, cues, make_target, unit_vector


def test_a_unit_vector_has_unit_norm_and_no_negative_entry() -> None:
    vector = unit_vector(512, "0 bio")
    assert vector.shape == (512,)
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)
    assert (vector >= 0).all()
    # Uniform on [0, 1) before it is scaled: the mean entry is sqrt(3) / 2 of the root of the mean square.
    assert (vector.mean() * 512**0.5).item() == pytest.approx(3**0.5 / 2, abs=0.03)


def test_the_same_seed_gives_the_same_vector_whatever_the_global_seed() -> None:
    torch.manual_seed(1)
    first, state = unit_vector(64, "0 bio"), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, unit_vector(64, "0 bio"))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0 bio", "0 cyber"),
        ("0 bio", "1 bio"),
        ("0 compounds", "0 cooking"),
        ("0 chemistry_a", "0 chemistry_b"),
        ("20240 bio", "20240 cyber"),
    ],
)
def test_other_topics_and_other_seeds_give_other_vectors(one: str, other: str) -> None:
    """However late in the name the difference comes."""
    assert torch.cosine_similarity(unit_vector(256, one), unit_vector(256, other), dim=0) < 0.9


FROZEN = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[100.0, 0.0], [6.0, 8.0]]])
COUNTED = torch.tensor([[True, True], [False, True]])


AS_THE_PAPER = Rmu(target_layer=0, adapter_layers=[0], padding="paper")


def topic(**changes: Any) -> Topic:
    return Topic(**{"corpus": Corpus(source="./nowhere"), "alpha": 1.0} | changes)


def test_random_is_one_vector_of_the_given_length() -> None:
    target = make_target("bio", topic(steering="random", steering_coefficient=6.5), AS_THE_PAPER, 2, [])
    assert torch.equal(target.of(FROZEN, COUNTED), 6.5 * unit_vector(2, "0 bio"))
    assert (target.length(), target.coefficient) == (6.5, 6.5)


def test_adaptive_takes_its_length_from_the_first_batch_and_keeps_it() -> None:
    target = make_target("bio", topic(adaptive_scale=5.0), AS_THE_PAPER, 2, [])
    assert target.coefficient is None
    assert target.needs_all
    expected = 5 * (5 + 1 + 10) / 3
    made = target.of(FROZEN, COUNTED)
    torch.testing.assert_close(made, expected * unit_vector(2, "0 bio"))
    assert torch.equal(target.of(1000 * FROZEN, COUNTED), made)
    assert target.length() == pytest.approx(expected)
    assert not target.needs_all


def test_adaptive_takes_the_median_where_sinks_are_masked() -> None:
    target = make_target("bio", topic(adaptive_scale=5.0), Rmu(target_layer=0, adapter_layers=[0]), 2, [])
    target.of(FROZEN, COUNTED)
    assert target.coefficient == pytest.approx(5 * 5)  # of norms 5, 1 and 10


def test_adaptive_does_not_overflow_in_half_precision() -> None:
    target = make_target("bio", topic(adaptive_scale=5.0), AS_THE_PAPER, 4, [])
    target.of(torch.full((1, 2, 4), 1e4, dtype=torch.float16), torch.ones(1, 2, dtype=torch.bool))
    assert target.coefficient == pytest.approx(1e5, rel=1e-3)


def contrastive(**changes: Any) -> Topic:
    return topic(steering="contrastive", steering_coefficient=2.0, **changes)


@pytest.mark.parametrize(("direction", "move"), [("unit", [-1.2, 1.6]), ("raw", [-6.0, 8.0])])
def test_contrastive_moves_every_token_from_expert_to_novice(direction: str, move: list[float]) -> None:
    """By the coefficient times a vector of length 1, as the authors do, or times the difference itself, as old runs did."""
    novice, expert = torch.tensor([1.0, 5.0]), torch.tensor([4.0, 1.0])
    target = make_target(
        "bio", contrastive(contrastive_direction=direction), AS_THE_PAPER, 2, [novice, expert]
    )
    torch.testing.assert_close(target.of(FROZEN, COUNTED), FROZEN + torch.tensor(move))
    assert target.length() == pytest.approx(math.hypot(*move))


def test_a_novice_who_is_an_expert_gives_no_direction() -> None:
    same = torch.tensor([1.0, 5.0])
    target = make_target("bio", contrastive(), AS_THE_PAPER, 2, [same, same])
    with pytest.raises(UserError, match="The control vector of bio is 0 long"):
        check_scale("bio", target.length(), 5.0)


def test_cues_name_the_topic() -> None:
    novice, expert = (
        "You are a novice in bio who often makes mistakes.",
        "You are a world-class expert in bio.",
    )
    assert cues("bio", contrastive()) == [novice, expert]
    about = contrastive(about="building bombs")
    assert cues("bio", about) == [sentence.replace("bio", "building bombs") for sentence in (novice, expert)]
    assert cues("bio", contrastive(contrastive_direction="raw")) == [
        "You are a novice at bio",
        "You are an expert at bio",
    ]
    assert cues("bio", topic()) == []


@pytest.mark.parametrize("length", [0.0009, 1001.0, math.nan, math.inf])
def test_a_vector_of_another_scale_than_the_activations_is_refused(length: float) -> None:
    with pytest.raises(UserError) as raised:
        check_scale("bio", 20 * length, 20.0 if length > 1 else 2.0)
    text = str(raised.value)
    assert re.search(
        r"The control vector of bio is \S+ long, but activations at the target layer have a norm of (20|2)",
        text,
    )
    assert (
        "Set topics.bio.steering_coefficient to a few times that norm, or topics.bio.steering to adaptive."
        in text
    )


@pytest.mark.parametrize("length", [6.5, 300.0])
def test_the_papers_coefficients_pass(length: float) -> None:
    for norm in (0.5, 3.0, 100.0):
        check_scale("bio", length, norm)
