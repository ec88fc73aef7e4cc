"""RMU's losses: by hand, against torch, and unmoved by padding."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, pad

from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UPDATED, TARGET = randn(3, 5, 8), randn(3, 5, 8, seed=1)
LENGTHS = torch.tensor([[5], [2], [4]])
COUNTED = torch.arange(5) < LENGTHS


def test_it_is_mse_loss_where_every_position_counts() -> None:
    everywhere = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(masked_mse(UPDATED, TARGET, everywhere), mse_loss(UPDATED, TARGET))
    vector = TARGET[0, 0]
    torch.testing.assert_close(masked_mse(UPDATED, vector, everywhere), mse_loss(UPDATED, vector.expand_as(UPDATED)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_adding_padding_changes_nothing(side: str) -> None:
    """Trap 8: a mean over `[batch]` divided by `[batch, 1]` would mix examples."""
    places = (3, 0) if side == "left" else (0, 3)
    longer = [pad(tensor, (0, 0, *places), value=1e3 * (index + 1)) for index, tensor in enumerate((UPDATED, TARGET))]
    counted = pad(COUNTED, places, value=False)
    for figure in (masked_mse, mean_cosine):
        torch.testing.assert_close(figure(*longer, counted), figure(UPDATED, TARGET, COUNTED), rtol=1e-6, atol=1e-6)
    assert mean_norm(longer[0], counted) == pytest.approx(mean_norm(UPDATED, COUNTED), rel=1e-6)


def test_every_counted_token_weighs_the_same() -> None:
    tokens = [(UPDATED[row, column] - TARGET[row, column]).square().mean() for row in range(3) for column in range(int(LENGTHS[row]))]
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
