"""The RMU loop: topics take turns, a forget and a retain batch a step, adapters learn.

    loss = mse(updated_forget, c * u) + alpha * mse(updated_retain, frozen_retain)      (Li et al. 2024)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lowmem_rmu.data.corpora import Batch, batch_at, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.memory import memory_in_use
from lowmem_rmu.presets import Rmu, Topic
from lowmem_rmu.unlearning.checkpoint import Progress, load_checkpoint, save_checkpoint, trainable
from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm
from lowmem_rmu.unlearning.targets import adaptive_coefficient, unit_vector


@dataclass(frozen=True)
class UnlearningData:
    """Token sequences to train on: `forget` a topic, `retain` for all."""

    forget: dict[str, list[list[int]]]
    retain: list[list[int]]
    pad_id: int


@dataclass(frozen=True)
class Activations:
    """What leaves the target layer, `(batch, sequence, hidden)`, and which positions count in the losses."""

    updated: Tensor
    frozen: Tensor
    counted: Tensor


class Unlearning:
    """One run of RMU over a model with an adapter. `rows` of metrics come from `step`; the state is the adapter, AdamW and a step count."""

    def __init__(self, model: PeftModel, rmu: Rmu, topics: dict[str, Topic], data: UnlearningData) -> None:
        self.model, self.rmu, self.topics, self.data = model, rmu, topics, data
        self.device = next(model.parameters()).device
        self.updated_layers = slice(min(rmu.adapter_layers), rmu.target_layer + 1)
        self.optimizer = torch.optim.AdamW(trainable(model).values(), lr=rmu.learning_rate)
        self.progress = Progress(0, {})
        hidden = model.config.hidden_size
        self.units = {name: unit_vector(hidden, f"{rmu.seed} {name}").to(self.device) for name in topics}

    def restore(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint, if there is one."""
        self.progress = load_checkpoint(checkpoint, self.model, self.optimizer) or self.progress

    def run(self, checkpoint: Path, on_step: Callable[[dict[str, Any]], None], stop: Callable[[], bool]) -> bool:
        """Trains to the last step; False where `stop` ended it before, with a checkpoint kept."""
        while self.progress.step < self.rmu.steps:
            on_step(self.step())
            stopping = stop() and self.progress.step < self.rmu.steps
            if stopping or self.progress.step % self.rmu.checkpoint_every == 0:
                save_checkpoint(checkpoint, self.model, self.optimizer, self.progress)
            if stopping:
                return False
        return True

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of `metrics.jsonl`. Raises UserError where the loss is not finite."""
        started = time.monotonic()
        turn, place = divmod(self.progress.step, len(self.topics))
        name = list(self.topics)[place]
        forget_batch, retain_batch = self._batches(name, turn)
        forget = self._activations(forget_batch)
        target = self._coefficient(name, forget) * self.units[name]
        forget_loss = masked_mse(forget.updated, target, forget.counted)
        forget_loss.backward()
        retain = self._activations(retain_batch)
        retain_loss = masked_mse(retain.updated, retain.frozen, retain.counted)
        (self.topics[name].alpha * retain_loss).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), self.rmu.max_grad_norm)
        self._check_finite(forget_loss, retain_loss, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return {
            "step": self.progress.step,
            "topic": name,
            "loss": forget_loss.item() + self.topics[name].alpha * retain_loss.item(),
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "forget_cosine": mean_cosine(forget.updated, forget.frozen, forget.counted),
            "retain_cosine": mean_cosine(retain.updated, retain.frozen, retain.counted),
            "forget_norm": mean_norm(forget.updated, forget.counted),
            "retain_norm": mean_norm(retain.updated, retain.counted),
            "grad_norm": grad_norm.item(),
            "tokens": int(forget_batch.is_token.sum() + retain_batch.is_token.sum()),
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": memory_in_use(self.device),
        }

    def _batches(self, name: str, turn: int) -> tuple[Batch, Batch]:
        """The topic's forget and retain batch of its turn. In the paper's order (no shuffle) topics share a turn's retain batch."""
        rmu, side = self.rmu, "left" if self.rmu.padding == "paper" else "right"
        forget = batch_at(self.data.forget[name], turn, rmu.batch_size, f"{rmu.seed} {name}" if rmu.shuffle else None)
        retain = batch_at(
            self.data.retain, turn, rmu.retain_batch_size or rmu.batch_size, f"{rmu.seed} retain {name}" if rmu.shuffle else None
        )
        return pad(forget, self.data.pad_id, side, self.device), pad(retain, self.data.pad_id, side, self.device)

    def _activations(self, batch: Batch) -> Activations:
        """Both paths over one trunk: frozen with the adapter off, updated with it on."""
        trunk = run_trunk(self.model, batch.input_ids, batch.attention_mask, self.updated_layers)
        with torch.no_grad(), base_only(self.model):
            frozen = run_layers(self.model, trunk, self.updated_layers)
        updated = run_layers(self.model, trunk, self.updated_layers, self.rmu.activation_checkpointing)
        counted = torch.ones_like(batch.is_token) if self.rmu.padding == "paper" else batch.is_token
        return Activations(updated, frozen, counted)

    def _coefficient(self, name: str, forget: Activations) -> float:
        """The topic's steering coefficient; an adaptive one is fixed by its first forget batch."""
        topic = self.topics[name]
        if name not in self.progress.coefficients:
            fixed = topic.steering_coefficient
            self.progress.coefficients[name] = (
                adaptive_coefficient(forget.frozen, forget.counted, topic.adaptive_scale) if fixed == "adaptive" else float(fixed)
            )
        return self.progress.coefficients[name]

    def _check_finite(self, *figures: Tensor) -> None:
        if not all(math.isfinite(figure.item()) for figure in figures):
            raise UserError(
                f"The loss is no longer finite at step {self.progress.step + 1}.\n"
                "Lower rmu.learning_rate, or a topic's steering_coefficient; the last checkpoint is kept."
            )

