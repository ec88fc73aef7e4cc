"""The RMU loop: topics take turns, a forget and a retain batch a step, adapters learn.

    loss = mse(updated_forget, target) + alpha * mse(updated_retain, frozen_retain)      (Li et al. 2024; RMU's target is c * u)
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.optim import AdamW8bit
from peft import PeftModel
from torch import Tensor

from lowmem_rmu.data.corpora import Batch, Batches, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.layers import Trunk, run_layers, run_trunk
from lowmem_rmu.model.memory import memory_in_use
from lowmem_rmu.presets import Rmu, Topic
from lowmem_rmu.unlearning.cache import HiddenStateCache
from lowmem_rmu.unlearning.checkpoint import BestWeights, Progress, load_checkpoint, save_checkpoint, trainable
from lowmem_rmu.unlearning.drift import Check, Guard, GuardData, LayerGuard, best_of, collapse, has_collapsed, is_gone, is_too_far, outcome
from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm, sink_scale
from lowmem_rmu.unlearning.targets import check_scale, make_target

EXPLODED = 10.0  # times the norm that retain activations should keep
ADVICE = "Lower rmu.learning_rate, or a topic's steering_coefficient; the last checkpoint is kept."
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}


@dataclass(frozen=True)
class UnlearningData:
    """Token sequences to train on: `forget` a topic, `retain` for all; `cues` a topic whose target is made of them."""

    forget: dict[str, list[list[int]]]
    retain: list[list[int]]
    pad_id: int
    cues: dict[str, list[list[int]]] = field(default_factory=dict)
    guard: GuardData | None = None
    is_whole: bool = True
    """Whether the layers above the target layer are loaded too: the guard then measures predictions, else the target layer's output."""


class BatchKey(NamedTuple):
    """A distinct batch: the corpus (a topic's number, or -1 for the retain set) and the number within it."""

    corpus: int
    number: int

    def __str__(self) -> str:
        return f"{'retain' if self.corpus < 0 else self.corpus}-{self.number}"


class Turn(NamedTuple):
    """What a step trains on."""

    topic: str
    forget: BatchKey
    retain: BatchKey


@dataclass(frozen=True)
class Activations:
    """What leaves the target layer, `(batch, sequence, hidden)`, and which positions count in the losses.

    Of the frozen path there may be the batch's first sample only.
    """

    updated: Tensor
    frozen: Tensor
    counted: Tensor
    scale: Tensor
    """As `sink_scale` gives it; 1 everywhere where sinks count like other positions."""
    tokens: int

    @property
    def ordinary(self) -> Tensor:
        """The counted positions without attention sinks, `(batch, sequence)`."""
        return self.counted & (self.scale == 1)

    @property
    def sinks(self) -> int:
        """How many counted positions are attention sinks."""
        return int((self.counted & (self.scale != 1)).sum())

    def cosine(self) -> float:
        samples = len(self.frozen)
        return mean_cosine(self.updated[:samples], self.frozen, self.ordinary[:samples])

    def norm(self) -> float:
        return mean_norm(self.updated, self.ordinary)

    def frozen_norm(self) -> float:
        return mean_norm(self.frozen, self.ordinary[: len(self.frozen)])


class Unlearning:
    """One run of RMU over a model with an adapter. `rows` of metrics come from `step`; the state is the adapter, AdamW and `progress`."""

    def __init__(self, model: PeftModel, rmu: Rmu, topics: dict[str, Topic], data: UnlearningData, cache_folder: Path | None = None) -> None:
        self.model, self.rmu, self.topics, self.data = model, rmu, topics, data
        self.device = next(model.parameters()).device
        self.updated_layers = slice(min(rmu.adapter_layers), rmu.target_layer + 1)
        self.optimizer = OPTIMIZERS[rmu.optimizer](trainable(model).values(), lr=rmu.learning_rate)
        self.progress = Progress()
        self.guard = self._make_guard()
        self.batches = make_batches(rmu, data)
        self.turns = take_turns(rmu, list(topics), self.batches)
        self.comes_again = {key for key, times in Counter(key for turn in self.turns for key in turn[1:]).items() if times > 1}
        self.cache = HiddenStateCache(int(rmu.cache_gib * 2**30), cache_folder if rmu.cache_in == "disk" else None)
        hidden_size, cued = model.config.hidden_size, {name: [self._last_frozen(ids) for ids in each] for name, each in data.cues.items()}
        self.targets = {name: make_target(name, topic, rmu, hidden_size, cued.get(name, [])) for name, topic in topics.items()}

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
        """How far what is to stay may move, in the guard's unit."""
        return self.rmu.guard_limit if self.data.is_whole else self.rmu.guard_shift_limit

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {"rmu": self.rmu.model_dump(), "topics": {name: topic.model_dump() for name, topic in self.topics.items()}}

    def restore(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint, if there is one. Raises UserError for one of other settings."""
        self.progress = load_checkpoint(checkpoint, self.model, self.optimizer, self.settings) or self.progress
        self.cache.restore(self.progress.cached)
        for name, coefficient in self.progress.coefficients.items():
            self.targets[name].coefficient = coefficient

    def run(self, checkpoint: Path, on_step: Callable[[dict[str, Any]], None], stop: Callable[[], bool]) -> bool:
        """Train to the last step, or to where the guard ends it; False where `stop` ended it before, with a checkpoint kept.

        The best weights that the guard found are the ones that stay. Raises UserError where weights are not finite,
        before a checkpoint is made of them, and where the model has collapsed before the guard found anything worth keeping.
        """
        best = BestWeights(checkpoint)
        while not self._is_over():
            row = self.step()
            on_step(row | self._guarded(best))
            is_last = self._is_over()
            stopping = stop() and not is_last
            keeps = stopping or self.progress.step % self.rmu.checkpoint_every == 0
            if keeps or is_last:
                self._check_weights()
            if keeps:
                self.progress.cached = self.cache.keys()
                save_checkpoint(checkpoint, self.model, self.optimizer, self.progress, self.settings)
                best.keep_only(self.best.step if self.best else None)
            if stopping:
                return False
        if self.best is not None and self.best.step != self.progress.step:
            best.restore(self.best.step, trainable(self.model))
        return True

    @property
    def best(self) -> Check | None:
        """The guard's best check so far."""
        return best_of(self.progress.checks, self.limit)

    def _is_over(self) -> bool:
        """Whether all steps are done, or the guard has ended training.

        It does where the topic is far enough from base, and where the rest is too far while there is a better point.
        """
        if self.progress.step >= self.rmu.steps or is_gone(self.best):
            return True
        return self.best is not None and is_too_far(self.progress.checks, self.limit)

    def _guarded(self, weights: BestWeights) -> dict[str, Any]:
        """Let the guard look where it is its turn; what it found, for the step's row.

        Raises UserError where the model has collapsed and there is no better point to go back to.
        """
        if self.guard is None or (self.progress.step % self.rmu.guard_every and self.progress.step != self.rmu.steps):
            return {}
        self._check_weights()
        check = self.guard.check(self.progress.step)
        self.progress.checks.append(check)
        if self.best is check:
            weights.save(check.step, trainable(self.model))
        if self.best is None and has_collapsed(self.progress.checks, self.limit):
            raise UserError(collapse(check))
        return check.row()

    @property
    def outcome(self) -> str | None:
        """What became of a run that the guard looked after, in words; None without a guard."""
        return outcome(self.progress.checks, self.limit, self.rmu.steps) if self.progress.checks else None

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of `metrics.jsonl`. Raises UserError where training has gone wrong."""
        started = time.monotonic()
        turn = self.turns[self.progress.step]
        name, alpha = turn.topic, self.topics[turn.topic].alpha
        forget = self._activations(turn.forget, None if self.targets[name].needs_all else 1)
        target = self._target(name, forget)
        forget_loss = masked_mse(forget.updated, target, forget.ordinary)
        forget_loss.backward()
        retain = self._activations(turn.retain)
        retain_loss = masked_mse(retain.updated, retain.frozen, retain.counted, retain.scale)
        (alpha * retain_loss).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), self.rmu.max_grad_norm or math.inf)
        retain_norm = retain.norm()
        self._check(retain_norm / retain.frozen_norm(), forget_loss, retain_loss, grad_norm)
        self._update()
        return {
            "step": self.progress.step,
            "topic": name,
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

    def _update(self) -> None:
        """Let the optimizer step, at a learning rate that follows from the number of steps done."""
        left = 1 - self.progress.step / self.rmu.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.rmu.learning_rate * (left if self.rmu.schedule == "linear" else 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1

    def _activations(self, key: BatchKey, samples: int | None = None) -> Activations:
        """Both paths over one trunk: updated with the adapter on, frozen with it off and for the first `samples` alone (None: all).

        Trunk and frozen path run once a distinct batch, where the cache has room for them.
        """
        side = "left" if self.rmu.padding == "paper" else "right"
        batch = pad(self.batches[key.corpus][key.number], self.data.pad_id, side, self.device)
        known = self.cache.get(str(key), self.device)
        trunk = run_trunk(self.model, batch.input_ids, batch.attention_mask, self.updated_layers, known["trunk"] if known else None)
        counted = torch.ones_like(batch.is_token) if self.rmu.padding == "paper" else batch.is_token
        if known is None:
            known = {"trunk": trunk.hidden} | self._frozen_path(batch, trunk, counted, samples)
            if key in self.comes_again:
                self.cache.put(str(key), known)
        updated = run_layers(self.model, trunk, self.updated_layers, self.rmu.activation_checkpointing)
        return Activations(updated, known["frozen"][:samples], counted, known["scale"], int(batch.is_token.sum()))

    def _frozen_path(self, batch: Batch, trunk: Trunk, counted: Tensor, samples: int | None) -> dict[str, Tensor]:
        """What is kept of the base model's path: the activations of the first `samples`, and the scale of every position.

        Only all of the samples show where the sinks are.
        """
        with torch.no_grad(), base_only(self.model):
            frozen = self._frozen(batch, trunk, None if self.rmu.masks_sinks else samples)
        scale = sink_scale(frozen, counted) if self.rmu.masks_sinks else torch.ones_like(counted, dtype=torch.float32)
        return {"frozen": frozen[:samples], "scale": scale}

    def _frozen(self, batch: Batch, trunk: Trunk, samples: int | None) -> Tensor:
        """Run the updated layers over the first `samples` (None: all). A layer's arguments are made for the batch, so fewer need their own."""
        if samples is not None and samples < len(batch.input_ids):
            mask = batch.attention_mask[:samples] if batch.attention_mask is not None else None
            trunk = run_trunk(self.model, batch.input_ids[:samples], mask, self.updated_layers, trunk.hidden[:samples])
        return run_layers(self.model, trunk, self.updated_layers)

    def _last_frozen(self, ids: list[int]) -> Tensor:
        """The frozen activation `(hidden,)` of a text's last token."""
        with torch.no_grad(), base_only(self.model):
            trunk = run_trunk(self.model, torch.tensor([ids], device=self.device), None, self.updated_layers)
            return run_layers(self.model, trunk, self.updated_layers)[0, -1]

    def _target(self, name: str, forget: Activations) -> Tensor:
        """Where this forget batch is pushed to. A topic's first batch fixes its coefficient and shows whether it makes sense."""
        target, made = self.targets[name], self.targets[name].of(forget.frozen, forget.ordinary[: len(forget.frozen)])
        if name not in self.progress.coefficients:
            check_scale(name, target.length(), forget.frozen_norm())
            self.progress.coefficients[name] = target.coefficient or 0.0
        return made

    def _check_weights(self) -> None:
        """Raise UserError where a trained weight is infinite or not a number: a loss shows that one step later only."""
        if not all(bool(torch.isfinite(weight).all()) for weight in trainable(self.model).values()):
            raise UserError(f"The trained weights are no longer finite after step {self.progress.step}.\n{ADVICE}")

    def _check(self, retain_growth: float, *figures: Tensor) -> None:
        if not all(math.isfinite(figure.item()) for figure in figures):
            raise UserError(f"The loss is no longer finite at step {self.progress.step + 1}.\n{ADVICE}")
        if retain_growth > EXPLODED:
            raise UserError(
                f"Activations explode at step {self.progress.step + 1}: on the retain set they are {retain_growth:.0f} times as large as the "
                f"base model's.\n{ADVICE}"
            )


def make_batches(rmu: Rmu, data: UnlearningData) -> dict[int, Batches]:
    """The batches of each topic, by its number, and of the retain set, at -1."""
    forget = {
        number: Batches(sequences, rmu.batch_size, f"{rmu.seed} {name}" if rmu.shuffle else None)
        for number, (name, sequences) in enumerate(data.forget.items())
    }
    return forget | {-1: Batches(data.retain, rmu.retain_batch_size or rmu.batch_size, f"{rmu.seed} retain" if rmu.shuffle else None)}


def take_turns(rmu: Rmu, topics: list[str], batches: dict[int, Batches]) -> list[Turn]:
    """The whole run, a turn a step. In the paper's order the topics of a round share its retain batch."""
    turns = []
    for step in range(rmu.steps):
        rounds, topic = divmod(step, len(topics))
        retain = batches[-1].at(step if rmu.shuffle else rounds)
        turns.append(Turn(topics[topic], BatchKey(topic, batches[topic].at(rounds)), BatchKey(-1, retain)))
    return turns
