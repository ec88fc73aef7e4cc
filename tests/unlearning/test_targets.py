"""Control vectors: direction and length."""

import pytest
import torch

from lowmem_rmu.unlearning.targets import adaptive_coefficient, unit_vector


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
    [("0 bio", "0 cyber"), ("0 bio", "1 bio"), ("0 compounds", "0 cooking"), ("0 chemistry_a", "0 chemistry_b"), ("20240 bio", "20240 cyber")],
)
def test_other_topics_and_other_seeds_give_other_vectors(one: str, other: str) -> None:
    """However late in the name the difference comes."""
    assert torch.cosine_similarity(unit_vector(256, one), unit_vector(256, other), dim=0) < 0.9


def test_the_adaptive_coefficient_by_hand() -> None:
    activations = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[100.0, 0.0], [6.0, 8.0]]])
    is_token = torch.tensor([[True, True], [False, True]])
    assert adaptive_coefficient(activations, is_token, 5.0) == pytest.approx(5 * (5 + 1 + 10) / 3)


def test_the_adaptive_coefficient_does_not_overflow_in_half_precision() -> None:
    activations = torch.full((1, 2, 4), 1e4, dtype=torch.float16)
    assert adaptive_coefficient(activations, torch.ones(1, 2, dtype=torch.bool), 5.0) == pytest.approx(1e5, rel=1e-3)
