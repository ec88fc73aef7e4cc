"""RMU's two losses, and the figures that show what they do. Activations are `(batch, sequence, hidden)`."""

import torch
from torch import Tensor

SINK_RATIO = 4.0
"""A position whose frozen norm is more than so many times its sample's median is an attention sink."""


def masked_mse(updated: Tensor, target: Tensor, counted: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean squared error over hidden units and the positions where `counted` `(batch, sequence)` is True, in
    float32.

    With `counted` all True it is torch's `mse_loss`; with padding left out, adding padding changes nothing.
    `scale` `(batch, sequence)` multiplies the difference at each position before it is squared.
    """
    difference = updated.float() - target.float()
    if scale is not None:
        difference = difference * scale.unsqueeze(-1)
    squares = difference.square().mean(-1)
    return (squares * counted).sum() / counted.sum()


@torch.no_grad()
def sink_scale(frozen: Tensor, counted: Tensor) -> Tensor:
    """Return, for each position, what brings its norm down to an ordinary one: `(batch, sequence)`, 1 at
    ordinary positions.

    Many models put a massive activation on a text's first token, which attention relies on (Sun et al. 2024,
    arXiv 2402.17762). Such an attention sink has a norm above `SINK_RATIO` times the median of its sample's
    counted positions; there the scale is that median divided by the norm, and elsewhere, padding included, it
    is 1.
    """
    norms = frozen.float().norm(dim=-1)
    # A median of counted positions alone: the others are not numbers, which `nanmedian` passes over.
    medians = norms.masked_fill(~counted, torch.nan).nanmedian(dim=-1, keepdim=True).values
    is_sink = counted & (norms > SINK_RATIO * medians)
    return torch.where(is_sink, medians / norms, torch.ones_like(norms))


@torch.no_grad()
def mean_cosine(first: Tensor, second: Tensor, counted: Tensor) -> float:
    """Mean cosine similarity over counted positions: 1 where a path still goes where it went."""
    cosines = torch.cosine_similarity(first.float(), second.float(), dim=-1)
    return ((cosines * counted).sum() / counted.sum()).item()


@torch.no_grad()
def mean_norm(activations: Tensor, counted: Tensor) -> float:
    return ((activations.float().norm(dim=-1) * counted).sum() / counted.sum()).item()


@torch.no_grad()
def median_norm(activations: Tensor, counted: Tensor) -> float:
    """Median norm over counted positions: unlike the mean, it hardly notices a few of another size."""
    return activations.float().norm(dim=-1)[counted].median().item()
