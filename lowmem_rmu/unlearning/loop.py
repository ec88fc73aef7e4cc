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

from lowmem_rmu.data.corpora import Batches, pad
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.memory import memory_in_use
from lowmem_rmu.presets import Rmu, Topic
from lowmem_rmu.unlearning.cache import HiddenStateCache
from lowmem_rmu.unlearning.checkpoint import Progress, load_checkpoint, save_checkpoint, trainable
from lowmem_rmu.unlearning.losses import masked_mse, mean_cosine, mean_norm
from lowmem_rmu.unlearning.targets import check_scale, make_target

EXPLODED = 10.0  # times the norm that retain activations should keep
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}


@dataclass(frozen=True)
class UnlearningData:
    """Token sequences to train on: `forget` a topic, `retain` for all; `cues` a topic whose target is made of them."""

    forget: dict[str, list[list[int]]]
    retain: list[list[int]]
    pad_id: int
    cues: dict[str, list[list[int]]] = field(default_factory=dict)


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
    tokens: int

    def cosine(self) -> float:
        samples = len(self.frozen)
        return mean_cosine(self.updated[:samples], self.frozen, self.counted[:samples])

    def frozen_norm(self) -> float:
        return mean_norm(self.frozen, self.counted[: len(self.frozen)])


class Unlearning:
    """One run of RMU over a model with an adapter. `rows` of metrics come from `step`; the state is the adapter, AdamW and `progress`."""

    def __init__(self, model: PeftModel, rmu: Rmu, topics: dict[str, Topic], data: UnlearningData, cache_folder: Path | None = None) -> None:
        self.model, self.rmu, self.topics, self.data = model, rmu, topics, data
        self.device = next(model.parameters()).device
        self.updated_layers = slice(min(rmu.adapter_layers), rmu.target_layer + 1)
        self.optimizer = OPTIMIZERS[rmu.optimizer](trainable(model).values(), lr=rmu.learning_rate)
        self.progress = Progress()
        self.batches = make_batches(rmu, data)
        self.turns = take_turns(rmu, list(topics), self.batches)
        self.comes_again = {key for key, times in Counter(key for turn in self.turns for key in turn[1:]).items() if times > 1}
        self.cache = HiddenStateCache(int(rmu.cache_gib * 2**30), cache_folder if rmu.cache_in == "disk" else None)
        hidden_size, cued = model.config.hidden_size, {name: [self._last_frozen(ids) for ids in each] for name, each in data.cues.items()}
        self.targets = {name: make_target(name, topic, rmu.seed, hidden_size, cued.get(name, [])) for name, topic in topics.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint belongs to; where the texts lie may change, as when a run is renamed that holds its own."""
        topics = {name: topic.model_dump(exclude={"corpus": {"source"}}) for name, topic in self.topics.items()}
        return {"rmu": self.rmu.model_dump(), "topics": topics}

    def restore(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint, if there is one. Raises UserError for one of other settings."""
        self.progress = load_checkpoint(checkpoint, self.model, self.optimizer, self.settings) or self.progress
        self.cache.restore(self.progress.cached)
        for name, coefficient in self.progress.coefficients.items():
            self.targets[name].coefficient = coefficient

    def run(self, checkpoint: Path, on_step: Callable[[dict[str, Any]], None], stop: Callable[[], bool]) -> bool:
        """Trains to the last step; False where `stop` ended it before, with a checkpoint kept."""
        while self.progress.step < self.rmu.steps:
            on_step(self.step())
            stopping = stop() and self.progress.step < self.rmu.steps
            if stopping or self.progress.step % self.rmu.checkpoint_every == 0:
                self.progress.cached = self.cache.keys()
                save_checkpoint(checkpoint, self.model, self.optimizer, self.progress, self.settings)
            if stopping:
                return False
        return True

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of `metrics.jsonl`. Raises UserError where training has gone wrong."""
        started = time.monotonic()
        turn = self.turns[self.progress.step]
        name, alpha = turn.topic, self.topics[turn.topic].alpha
        forget = self._activations(turn.forget, None if self.targets[name].needs_all else 1)
        target = self._target(name, forget)
        forget_loss = masked_mse(forget.updated, target, forget.counted)
        forget_loss.backward()
        retain = self._activations(turn.retain)
        retain_loss = masked_mse(retain.updated, retain.frozen, retain.counted)
        (alpha * retain_loss).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), self.rmu.max_grad_norm or math.inf)
        retain_norm = mean_norm(retain.updated, retain.counted)
        self._check(retain_norm / retain.frozen_norm(), forget_loss, retain_loss, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return {
            "step": self.progress.step,
            "topic": name,
            "loss": forget_loss.item() + alpha * retain_loss.item(),
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "forget_cosine": forget.cosine(),
            "retain_cosine": retain.cosine(),
            "forget_norm": mean_norm(forget.updated, forget.counted),
            "retain_norm": retain_norm,
            "grad_norm": grad_norm.item(),
            "tokens": forget.tokens + retain.tokens,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": memory_in_use(self.device),
        }

    def _activations(self, key: BatchKey, samples: int | None = None) -> Activations:
        """Both paths over one trunk: updated with the adapter on, frozen with it off and for the first `samples` alone (None: all).

        Trunk and frozen path run once a distinct batch, where the cache has room for them.
        """
        side = "left" if self.rmu.padding == "paper" else "right"
        batch = pad(self.batches[key.corpus][key.number], self.data.pad_id, side, self.device)
        known = self.cache.get(str(key), self.device)
        trunk = run_trunk(self.model, batch.input_ids, batch.attention_mask, self.updated_layers, known["trunk"] if known else None)
        if known is None:
            with torch.no_grad(), base_only(self.model):
                known = {"trunk": trunk.hidden, "frozen": run_layers(self.model, trunk.first(samples), self.updated_layers)}
            if key in self.comes_again:
                self.cache.put(str(key), known)
        updated = run_layers(self.model, trunk, self.updated_layers, self.rmu.activation_checkpointing)
        counted = torch.ones_like(batch.is_token) if self.rmu.padding == "paper" else batch.is_token
        return Activations(updated, known["frozen"][:samples], counted, int(batch.is_token.sum()))

    def _last_frozen(self, ids: list[int]) -> Tensor:
        """The frozen activation `(hidden,)` of a text's last token."""
        with torch.no_grad(), base_only(self.model):
            trunk = run_trunk(self.model, torch.tensor([ids], device=self.device), None, self.updated_layers)
            return run_layers(self.model, trunk, self.updated_layers)[0, -1]

    def _target(self, name: str, forget: Activations) -> Tensor:
        """Where this forget batch is pushed to. A topic's first batch fixes its coefficient and shows whether it makes sense."""
        target, made = self.targets[name], self.targets[name].of(forget.frozen, forget.counted)
        if name not in self.progress.coefficients:
            check_scale(name, target.length(), forget.frozen_norm())
            self.progress.coefficients[name] = target.coefficient or 0.0
        return made

    def _check(self, retain_growth: float, *figures: Tensor) -> None:
        advice = "Lower rmu.learning_rate, or a topic's steering_coefficient; the last checkpoint is kept."
        if not all(math.isfinite(figure.item()) for figure in figures):
            raise UserError(f"The loss is no longer finite at step {self.progress.step + 1}.\n{advice}")
        if retain_growth > EXPLODED:
            raise UserError(
                f"Activations explode at step {self.progress.step + 1}: on the retain set they are {retain_growth:.0f} times as large as the "
                f"base model's.\n{advice}"
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
