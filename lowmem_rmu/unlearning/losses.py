"""RMU's two losses, and the figures that show what they do. Activations are `(batch, sequence, hidden)`."""

import torch
from torch import Tensor


def masked_mse(updated: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared error over hidden units and the positions where `counted` `(batch, sequence)` is True, in float32.

    With `counted` all True it is torch's `mse_loss`; with padding left out, adding padding changes nothing.
    """
    squares = (updated.float() - target.float()).square().mean(-1)
    return (squares * counted).sum() / counted.sum()


@torch.no_grad()
def mean_cosine(first: Tensor, second: Tensor, counted: Tensor) -> float:
    """Mean cosine similarity over counted positions: 1 where a path still goes where it went."""
    cosines = torch.cosine_similarity(first.float(), second.float(), dim=-1)
    return ((cosines * counted).sum() / counted.sum()).item()


@torch.no_grad()
def mean_norm(activations: Tensor, counted: Tensor) -> float:
    return ((activations.float().norm(dim=-1) * counted).sum() / counted.sum()).item()
