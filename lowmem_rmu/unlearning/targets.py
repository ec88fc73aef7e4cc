"""Control vectors: the fixed points in activation space that forget batches are pushed to, one a topic."""

from hashlib import sha256

import torch
from torch import Tensor


def unit_vector(hidden_size: int, seed: str) -> Tensor:
    """`torch.rand(hidden)` scaled to unit norm (Li et al. 2024, section 4): positive entries, the same for the same seed."""
    generator = torch.Generator().manual_seed(_number(seed))
    vector = torch.rand(hidden_size, generator=generator)
    return vector / vector.norm()


def adaptive_coefficient(activations: Tensor, is_token: Tensor, scale: float) -> float:
    """`scale` times the mean norm of the frozen activations `(batch, sequence, hidden)` of real tokens (arXiv 2408.06223)."""
    return scale * activations[is_token].float().norm(dim=-1).mean().item()


def _number(seed: str) -> int:
    """All of the seed's text counts: torch's CPU generator itself looks at 32 bits alone."""
    return int.from_bytes(sha256(seed.encode()).digest()[:4], "little")
