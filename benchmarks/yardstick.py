"""The yardstick: RMU as the paper writes it, plainly and at its full price. What the engine computes is
measured against this.

Two full models, full forward passes with logits, the target layer read by hooks, and AdamW over the whole
matrices. Written from the formula alone, sharing no code with `lowmem_rmu`:

    loss = mse(updated_forget, c * u) + alpha * mse(updated_retain, frozen_retain)

(Li et al. 2024, arXiv 2403.03218)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Padded:
    """A batch of tokens `(batch, sequence)`, and where it has any (1) or padding (0)."""

    input_ids: Tensor
    attention_mask: Tensor


class Yardstick:
    """Trains the matrices `mlp.down_proj` of `layers` in `updated`; `frozen` is a second copy of the same
    model.
    """

    def __init__(
        self,
        updated: PreTrainedModel,
        frozen: PreTrainedModel,
        layers: list[int],
        target_layer: int,
        learning_rate: float,
    ) -> None:
        self.updated, self.frozen, self.target_layer = updated, frozen, target_layer
        updated.requires_grad_(False)
        frozen.requires_grad_(False)
        self.matrices = {
            f"model.layers.{index}.mlp.down_proj.weight": updated.model.layers[index].mlp.down_proj.weight
            for index in layers
        }
        for matrix in self.matrices.values():
            matrix.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.matrices.values(), lr=learning_rate)

    def step(
        self, forget: Padded, retain: Padded, control_vector: Tensor, alpha: float
    ) -> tuple[float, float]:
        """One optimiser step; the forget and the retain loss, each a mean over all positions, padding too."""
        updated_forget = self._activations(self.updated, forget)
        forget_loss = nn.functional.mse_loss(updated_forget, control_vector.expand_as(updated_forget))
        updated_retain = self._activations(self.updated, retain)
        with torch.no_grad():
            frozen_retain = self._activations(self.frozen, retain)
        retain_loss = nn.functional.mse_loss(updated_retain, frozen_retain)
        self.optimizer.zero_grad()
        (forget_loss + alpha * retain_loss).backward()
        self.optimizer.step()
        return forget_loss.item(), retain_loss.item()

    def _activations(self, model: PreTrainedModel, batch: Padded) -> Tensor:
        """Return the output of the target layer, `(batch, sequence, hidden)`, of a full forward pass."""
        seen: list[Tensor] = []
        hook = model.model.layers[self.target_layer].register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        finally:
            hook.remove()
        return seen[0]
