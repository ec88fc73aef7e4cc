"""RMU's losses: by hand, against torch, and unmoved by padding."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, pad

from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm, median_norm, sink_scale


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UPDATED, TARGET = randn(3, 5, 8), randn(3, 5, 8, seed=1)
LENGTHS = torch.tensor([[5], [2], [4]])
COUNTED = torch.arange(5) < LENGTHS


def test_it_is_mse_loss_where_every_position_counts() -> None:
    everywhere = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(masked_mse(UPDATED, TARGET, everywhere), mse_loss(UPDATED, TARGET))
    vector = TARGET[0, 0]
    torch.testing.assert_close(
        masked_mse(UPDATED, vector, everywhere), mse_loss(UPDATED, vector.expand_as(UPDATED))
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_adding_padding_changes_nothing(side: str) -> None:
    """Trap 8: a mean over `[batch]` divided by `[batch, 1]` would mix examples."""
    places = (3, 0) if side == "left" else (0, 3)
    longer = [
        pad(tensor, (0, 0, *places), value=1e3 * (index + 1))
        for index, tensor in enumerate((UPDATED, TARGET))
    ]
    counted = pad(COUNTED, places, value=False)
    for figure in (masked_mse, mean_cosine):
        torch.testing.assert_close(
            figure(*longer, counted), figure(UPDATED, TARGET, COUNTED), rtol=1e-6, atol=1e-6
        )
    assert mean_norm(longer[0], counted) == pytest.approx(mean_norm(UPDATED, COUNTED), rel=1e-6)


def test_every_counted_token_weighs_the_same() -> None:
    tokens = [
        (UPDATED[row, column] - TARGET[row, column]).square().mean()
        for row in range(3)
        for column in range(int(LENGTHS[row]))
    ]
    assert len(tokens) == 11
    torch.testing.assert_close(masked_mse(UPDATED, TARGET, COUNTED), torch.stack(tokens).mean())


def test_an_example_by_hand() -> None:
    updated = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [100.0, 100.0]]])
    counted = torch.tensor([[True, True], [True, False]])
    # ((1-1)^2 + (2-0)^2) / 2 = 2;  (2^2 + 4^2) / 2 = 10;  (4^2 + 6^2) / 2 = 26;  their mean is 38 / 3
    assert masked_mse(updated, torch.tensor([1.0, 0.0]), counted).item() == pytest.approx(38 / 3)


def test_half_precision_is_compared_in_float32() -> None:
    far = torch.full((1, 1, 4), 300.0, dtype=torch.float16)  # 300 squared is beyond float16
    loss = masked_mse(far, torch.zeros(4), torch.ones(1, 1, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000


def test_gradients_reach_counted_positions_alone() -> None:
    updated = UPDATED.clone().requires_grad_()
    masked_mse(updated, TARGET, COUNTED).backward()
    assert torch.equal(updated.grad.abs().sum(-1) > 0, COUNTED)


def test_cosine_and_norm_by_hand() -> None:
    first = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    second = torch.tensor([[[6.0, 8.0], [0.0, 2.0], [-9.0, -9.0]]])
    counted = torch.tensor([[True, True, False]])
    assert mean_cosine(first, second, counted) == pytest.approx((1 + 0) / 2)
    assert mean_norm(first, counted) == pytest.approx((5 + 1) / 2)


def test_the_median_norm_by_hand() -> None:
    activations = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    counted = torch.tensor([[True, True, False], [True, False, False]])
    assert median_norm(activations, counted) == pytest.approx(2)


def with_sink(ratio: float) -> Tensor:
    """Activations with norms 2, 1, 1, 3 and 1, of which the first is `ratio` times as large."""
    return torch.tensor([2 * ratio, 1.0, 1.0, 3.0, 1.0]).unsqueeze(-1).repeat(1, 4).unsqueeze(0) / 2


@pytest.mark.parametrize(("ratio", "scale"), [(1.0, 1.0), (1.99, 1.0), (2.01, 1 / 4.02), (300.0, 1 / 600)])
def test_a_sink_is_scaled_down_to_the_median_of_its_sample(ratio: float, scale: float) -> None:
    made = sink_scale(with_sink(ratio), torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(made, torch.tensor([[scale, 1.0, 1.0, 1.0, 1.0]]))


def test_padding_is_no_sink_and_no_part_of_the_median() -> None:
    """Two zeros at the end would bring the median down from 1 to 0; a huge one would be a sink."""
    alone = sink_scale(with_sink(10.0), torch.ones(1, 5, dtype=torch.bool))
    for value in (0.0, 1e6):
        longer = pad(with_sink(10.0), (0, 0, 0, 7), value=value)
        made = sink_scale(longer, torch.arange(12).unsqueeze(0) < 5)
        torch.testing.assert_close(made, torch.cat([alone, torch.ones(1, 7)], dim=1))


def test_samples_are_looked_at_one_by_one() -> None:
    """A sample of larger activations makes no sinks of them, and hides none in another."""
    both = torch.cat([with_sink(10.0), 50 * with_sink(1.0)])
    made = sink_scale(both, torch.ones(2, 5, dtype=torch.bool))
    assert (made != 1).sum().item() == 1
    assert made[0, 0] < 1


def test_a_loss_with_scale_counts_what_is_lost_relative_to_size() -> None:
    frozen = with_sink(10.0)
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    scale = sink_scale(frozen, everywhere)
    at_the_sink, elsewhere = frozen.clone(), frozen.clone()
    at_the_sink[0, 0] *= 1.1
    elsewhere[0, 1] *= 1.1
    losses = [masked_mse(updated, frozen, everywhere, scale).item() for updated in (at_the_sink, elsewhere)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the other one's norm is the median
