"""Train an adapter with RMU (Li et al. 2024, arXiv 2403.03218): topics take turns, one forget and one retain
batch per step.

    loss = mse(updated_forget, target) + alpha * mse(updated_retain, frozen_retain)

The target is a control vector `c * u`, or what another steering gives (`steering.py`). Only the layers up to
the target layer run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from peft import PeftModel
from torch import Tensor

from lowmem_rmu.config.schema import Rmu, Topic
from lowmem_rmu.data.corpora import Batch, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.estimate import memory_in_use
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.layers import Trunk, run_layers, run_trunk
from lowmem_rmu.unlearning.cache import HiddenStateCache
from lowmem_rmu.unlearning.checkpoint import (
    BestWeights,
    Progress,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from lowmem_rmu.unlearning.guard import (
    Check,
    Guard,
    GuardData,
    LayerGuard,
    best_of,
    collapse,
    has_collapsed,
    is_gone,
    is_too_far,
    outcome,
)
from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm, sink_scale
from lowmem_rmu.unlearning.schedule import BatchKey, make_batches, make_schedule, recurring
from lowmem_rmu.unlearning.steering import check_scale, make_target

EXPLODED = 10.0
"""Retain activations of more than so many times their frozen norm end the training."""
ADVICE = "Lower rmu.learning_rate, or a topic's steering_coefficient; the last checkpoint is kept."
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": AdamW8bit,
}


@dataclass(frozen=True)
class TrainingData:
    """Token sequences to train on, by topic (`forget`) and for all topics together (`retain`)."""

    forget: dict[str, list[list[int]]]
    retain: list[list[int]]
    pad_id: int
    cues: dict[str, list[list[int]]] = field(default_factory=dict)
    """By topic, the sentences whose activations a contrastive direction is made of."""
    guard: GuardData | None = None
    is_whole: bool = True
    """Whether the layers above the target layer are loaded: the guard then measures predictions, else
    activations.
    """


@dataclass(frozen=True)
class Activations:
    """The output of the target layer on a batch, `(batch, sequence, hidden)`, and the positions that count in
    the losses.

    `frozen` may hold the batch's first sample only, where the loss does not need the others.
    """

    updated: Tensor
    frozen: Tensor
    counted: Tensor
    """True at the positions that count, `(batch, sequence)`."""
    scale: Tensor
    """The factors of `sink_scale`, `(batch, sequence)`; 1 everywhere where attention sinks count like other
    positions.
    """
    tokens: int

    @property
    def ordinary(self) -> Tensor:
        """The counted positions without attention sinks, `(batch, sequence)`."""
        return self.counted & (self.scale == 1)

    @property
    def sinks(self) -> int:
        """The number of counted positions that are attention sinks."""
        return int((self.counted & (self.scale != 1)).sum())

    def cosine(self) -> float:
        """Return the mean cosine similarity of the updated and the frozen activations."""
        samples = len(self.frozen)
        return mean_cosine(self.updated[:samples], self.frozen, self.ordinary[:samples])

    def norm(self) -> float:
        """Return the mean norm of the updated activations."""
        return mean_norm(self.updated, self.ordinary)

    def frozen_norm(self) -> float:
        """Return the mean norm of the frozen activations."""
        return mean_norm(self.frozen, self.ordinary[: len(self.frozen)])


class Trainer:
    """Train the adapter of a model with RMU.

    Everything that changes is the adapter, the optimizer's state and `progress`: a checkpoint of the three
    resumes a run exactly.

    Args:
        model: The model with its adapter, loaded at least up to the target layer.
        rmu: The settings of the training.
        topics: The topics to forget, by name.
        data: What to train on.
        cache_folder: Where hidden states are kept with `rmu.cache_in: disk`.

    """

    def __init__(
        self,
        model: PeftModel,
        rmu: Rmu,
        topics: dict[str, Topic],
        data: TrainingData,
        cache_folder: Path | None = None,
    ) -> None:
        self.model = model
        self.rmu = rmu
        self.topics = topics
        self.data = data
        self.device = next(model.parameters()).device
        self.updated_layers = slice(min(rmu.adapter_layers), rmu.target_layer + 1)
        self.optimizer = OPTIMIZERS[rmu.optimizer](trainable(model).values(), lr=rmu.learning_rate)
        self.progress = Progress()
        self.guard = self._make_guard()

        self.batches = make_batches(rmu, data.forget, data.retain)
        self.schedule = make_schedule(rmu, list(topics), self.batches)
        self.recurring = recurring(self.schedule)
        self.cache = HiddenStateCache(
            int(rmu.cache_gib * 2**30), cache_folder if rmu.cache_in == "disk" else None
        )

        self.targets = {}
        for name, topic in topics.items():
            cued = [self._last_frozen(ids) for ids in data.cues.get(name, [])]
            self.targets[name] = make_target(name, topic, rmu, model.config.hidden_size, cued)

    def _make_guard(self) -> Guard | LayerGuard | None:
        """Return the guard that the loaded layers allow, if the settings and the texts do."""
        texts = self.data.guard
        if texts is None or not self.rmu.guard_every:
            return None
        if self.data.is_whole:
            return Guard(self.model, texts, self.data.pad_id)
        return LayerGuard(self.model, texts, self.data.pad_id, self.updated_layers)

    @property
    def limit(self) -> float:
        """How far the model may move on what is to stay, in the guard's unit."""
        return self.rmu.guard_limit if self.data.is_whole else self.rmu.guard_shift_limit

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint belongs to."""
        topics = {name: topic.model_dump() for name, topic in self.topics.items()}
        return {"rmu": self.rmu.model_dump(), "topics": topics}

    @property
    def best(self) -> Check | None:
        """The guard's best check so far."""
        return best_of(self.progress.checks, self.limit)

    @property
    def outcome(self) -> str | None:
        """How a guarded training ended, in words; None without a guard."""
        if not self.progress.checks:
            return None
        return outcome(self.progress.checks, self.limit, self.rmu.steps)

    def restore(self, checkpoint: Path) -> None:
        """Resume from a checkpoint, if there is one. Raises UserError for one of other settings."""
        self.progress = (
            load_checkpoint(checkpoint, self.model, self.optimizer, self.settings) or self.progress
        )
        self.cache.restore(self.progress.cached)
        for name, coefficient in self.progress.coefficients.items():
            self.targets[name].coefficient = coefficient

    def run(
        self, checkpoint: Path, on_step: Callable[[dict[str, Any]], None], stop: Callable[[], bool]
    ) -> bool:
        """Train to the last step, or until the guard ends the training. The guard's best weights are the ones
        that stay.

        Args:
            checkpoint: The folder for checkpoints.
            on_step: Receives each step's row of `metrics.jsonl`.
            stop: Whether to stop now, asked after each step.

        Returns False where `stop` ended the training, with a checkpoint kept. Raises UserError where weights
        are not finite, before a checkpoint is made of them, and where the model has collapsed before the
        guard found anything worth keeping.

        """
        best_weights = BestWeights(checkpoint)
        while not self._is_over():
            row = self.step()
            on_step(row | self._check_drift(best_weights))

            # Keep a checkpoint every few steps and when asked to stop, never of weights that are not finite.
            is_last = self._is_over()
            is_stopping = stop() and not is_last
            is_due = is_stopping or self.progress.step % self.rmu.checkpoint_every == 0
            if is_due or is_last:
                self._check_weights()
            if is_due:
                self.progress.cached = self.cache.keys()
                save_checkpoint(checkpoint, self.model, self.optimizer, self.progress, self.settings)
                best_weights.keep_only(self.best.step if self.best else None)
            if is_stopping:
                return False

        if self.best is not None and self.best.step != self.progress.step:
            best_weights.restore(self.best.step, trainable(self.model))
        return True

    def step(self) -> dict[str, Any]:
        """Take one optimizer step. Returns its row of `metrics.jsonl`; raises UserError where the training
        diverges.
        """
        started = time.monotonic()
        turn = self.schedule[self.progress.step]
        alpha = self.topics[turn.topic].alpha

        # Forget: push the updated activations to the topic's target. Each loss is backpropagated by itself,
        # so that only one graph is in memory.
        needs_all = self.targets[turn.topic].needs_all
        forget = self._activations(turn.forget, None if needs_all else 1)
        target = self._target(turn.topic, forget)
        forget_loss = masked_mse(forget.updated, target, forget.ordinary)
        forget_loss.backward()

        # Retain: hold the updated activations where the frozen ones are.
        retain = self._activations(turn.retain)
        retain_loss = masked_mse(retain.updated, retain.frozen, retain.counted, retain.scale)
        (alpha * retain_loss).backward()

        # Refuse an update that would ruin the adapter.
        grad_norm = torch.nn.utils.clip_grad_norm_(
            trainable(self.model).values(), self.rmu.max_grad_norm or math.inf
        )
        retain_norm = retain.norm()
        self._check_losses(retain_norm / retain.frozen_norm(), forget_loss, retain_loss, grad_norm)

        # Update, at a learning rate that follows from the number of steps done.
        remaining = 1 - self.progress.step / self.rmu.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.rmu.learning_rate * (remaining if self.rmu.schedule == "linear" else 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1

        return {
            "step": self.progress.step,
            "topic": turn.topic,
            "loss": forget_loss.item() + alpha * retain_loss.item(),
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "forget_cosine": forget.cosine(),
            "retain_cosine": retain.cosine(),
            "forget_norm": forget.norm(),
            "retain_norm": retain_norm,
            "grad_norm": grad_norm.item(),
            "tokens": forget.tokens + retain.tokens,
            "sinks": forget.sinks + retain.sinks,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": memory_in_use(self.device),
        }

    def _activations(self, key: BatchKey, samples: int | None = None) -> Activations:
        """Return the activations of a batch on both paths: updated with the adapter on, frozen with it off.

        `samples` limits the frozen path to the first ones (None: all). The layers below the adapter, and the
        frozen path, run once per distinct batch where the cache has room for their output.
        """
        side = "left" if self.rmu.padding == "paper" else "right"
        batch = pad(self.batches[key.corpus][key.number], self.data.pad_id, side, self.device)
        counted = torch.ones_like(batch.is_token) if self.rmu.padding == "paper" else batch.is_token

        cached = self.cache.get(str(key), self.device)
        below = cached["trunk"] if cached else None
        trunk = run_trunk(self.model, batch.input_ids, batch.attention_mask, self.updated_layers, below)
        if cached is None:
            cached = {"trunk": trunk.hidden} | self._frozen_path(batch, trunk, counted, samples)
            if key in self.recurring:
                self.cache.put(str(key), cached)

        updated = run_layers(self.model, trunk, self.updated_layers, self.rmu.activation_checkpointing)
        return Activations(
            updated, cached["frozen"][:samples], counted, cached["scale"], int(batch.is_token.sum())
        )

    def _frozen_path(
        self, batch: Batch, trunk: Trunk, counted: Tensor, samples: int | None
    ) -> dict[str, Tensor]:
        """Return the frozen activations of the first `samples`, and the sink scale of every position.

        Where sinks are masked all samples run: only their activations show where the sinks are.
        """
        with torch.no_grad(), base_only(self.model):
            frozen = self._frozen(batch, trunk, None if self.rmu.masks_sinks else samples)
        if self.rmu.masks_sinks:
            scale = sink_scale(frozen, counted)
        else:
            scale = torch.ones_like(counted, dtype=torch.float32)
        return {"frozen": frozen[:samples], "scale": scale}

    def _frozen(self, batch: Batch, trunk: Trunk, samples: int | None) -> Tensor:
        """Run the updated layers over the first `samples` (None: all).

        The arguments of the layers are made for a batch, so that fewer samples need a trunk of their own.
        """
        if samples is not None and samples < len(batch.input_ids):
            mask = batch.attention_mask[:samples] if batch.attention_mask is not None else None
            trunk = run_trunk(
                self.model, batch.input_ids[:samples], mask, self.updated_layers, trunk.hidden[:samples]
            )
        return run_layers(self.model, trunk, self.updated_layers)

    def _last_frozen(self, ids: list[int]) -> Tensor:
        """Return the frozen activation `(hidden,)` of a text's last token."""
        with torch.no_grad(), base_only(self.model):
            trunk = run_trunk(self.model, torch.tensor([ids], device=self.device), None, self.updated_layers)
            return run_layers(self.model, trunk, self.updated_layers)[0, -1]

    def _target(self, name: str, forget: Activations) -> Tensor:
        """Return the target of a forget batch. The topic's first batch fixes its coefficient, and is checked
        for its scale.
        """
        target = self.targets[name]
        made = target.of(forget.frozen, forget.ordinary[: len(forget.frozen)])
        if name not in self.progress.coefficients:
            check_scale(name, target.length(), forget.frozen_norm())
            self.progress.coefficients[name] = target.coefficient or 0.0
        return made

    def _is_over(self) -> bool:
        """Return whether all steps are done, or the guard has ended the training.

        It does where the topic is far enough from base, and where the rest is too far while there is a better
        point.
        """
        if self.progress.step >= self.rmu.steps or is_gone(self.best):
            return True
        return self.best is not None and is_too_far(self.progress.checks, self.limit)

    def _check_drift(self, best_weights: BestWeights) -> dict[str, Any]:
        """Let the guard look at the model where a check is due. Returns what it found, for the step's row.

        Raises UserError where the model has collapsed and there is no better point to go back to.
        """
        if self.guard is None:
            return {}
        is_last = self.progress.step == self.rmu.steps
        if not is_last and self.progress.step % self.rmu.guard_every != 0:
            return {}
        self._check_weights()
        check = self.guard.check(self.progress.step)
        self.progress.checks.append(check)
        if self.best is check:
            best_weights.save(check.step, trainable(self.model))
        if self.best is None and has_collapsed(self.progress.checks, self.limit):
            raise UserError(collapse(check))
        return check.row()

    def _check_weights(self) -> None:
        """Raise UserError where a trained weight is infinite or not a number: a loss shows that one step
        later only.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in trainable(self.model).values()):
            raise UserError(
                f"The trained weights are no longer finite after step {self.progress.step}.",
                f"{ADVICE}",
            )

    def _check_losses(self, retain_growth: float, *figures: Tensor) -> None:
        """Raise UserError where a loss or the gradient is not finite, or the retain activations explode."""
        step = self.progress.step + 1
        if not all(math.isfinite(figure.item()) for figure in figures):
            raise UserError(
                f"The loss is no longer finite at step {step}.",
                f"{ADVICE}",
            )
        if retain_growth > EXPLODED:
            raise UserError(
                f"Activations explode at step {step}: on the retain set they are {retain_growth:.0f} times "
                "as large as the base model's.",
                f"{ADVICE}",
            )
