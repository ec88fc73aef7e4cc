"""The memory plan: what each stage needs, estimated from the model's shape alone; and what is in use now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lowmem_rmu.config.schema import Preset
from lowmem_rmu.model.adapters import check_layers
from lowmem_rmu.model.counts import Linear
from lowmem_rmu.model.loading import resolve_dtype
from lowmem_rmu.model.logits import POSITIONS
from lowmem_rmu.model.quantization import PIECE
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import STAGES
from lowmem_rmu.weights import shards

# 4 bits, an 8-bit constant a block of 64, and a float32 a block of 256 of those (double quantisation, arXiv
# 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4  # bytes: adapters, their inputs and gradients, and what a norm works on
STORED = 2  # bytes of a weight as checkpoints hold it, read one at a time
# Bytes a weight that bitsandbytes takes on a CPU while it brings a piece of a matrix to 4-bit; its GPU
# kernel takes none.
QUANTISING = 16
# Bytes on a CPU in addition to all tensors: threads' buffers, Python's objects; measured in every stage of
# the tiny model.
BUFFERS = 4 * 2**20
PROMPT_TOKENS = 64  # of a sample prompt in its chat template


@dataclass(frozen=True)
class StageNeed:
    """Bytes a stage needs on its device at its peak, beyond the libraries themselves."""

    stage: str
    weights: int
    working: int
    cache: int = 0
    """Of the hidden-state cache, at most: how much of it fills depends on the texts."""

    @property
    def total(self) -> int:
        return self.weights + self.working + self.cache


def peak_of(needs: list[StageNeed], stage: str | None = None) -> int:
    """Return bytes at the peak of a stage, or of all of them."""
    return max((need.total for need in needs if stage in (None, need.stage)), default=0)


def memory_in_use(device: torch.device) -> int:
    """Return bytes at the peak since `reset_peak`: of the GPU's allocator, or of this process (where its
    system tells no peak: now).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Start a new peak for `memory_in_use`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5", encoding="ascii")


def memory_available(device: torch.device) -> int:
    """Return bytes that a run could have on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan(
    preset: Preset, spec: ModelSpec, device: torch.device, stages: Sequence[str] = STAGES
) -> list[StageNeed]:
    """Estimate the memory of each stage that works on the model. The first loads it: all layers where one of
    them evaluates.

    `spec` is the preset's model. Its precision is taken from the preset, so that one `spec` serves presets
    that differ in it.
    """
    needs, evaluates = Needs(preset, spec, device), any(stage.startswith("evaluate") for stage in stages)
    loaded = needs.weights_held(None if evaluates else preset.rmu.target_layer + 1)
    planned = [
        StageNeed("evaluate-base", loaded, needs.evaluating(adapted=False)),
        StageNeed("unlearn", loaded, needs.unlearning(), needs.cache()),
        StageNeed("evaluate-unlearned", loaded + needs.adapter(), needs.evaluating(adapted=True)),
    ]
    planned = [need for need in planned if need.stage in stages]
    planned = [replace(need, working=max(need.working, needs.loading())) for need in planned[:1]] + planned[
        1:
    ]
    if device.type == "cpu":
        return [
            replace(need, working=need.working + BUFFERS + _kept_by_libc(need.working)) for need in planned
        ]
    return planned


def _kept_by_libc(working: int) -> int:
    """Return what glibc keeps of freed blocks for later: at most twice the largest block that it keeps, as
    far as there was so much.
    """
    return min(working // 2, 2 * shards.LARGEST_KEPT)


class Needs:
    """Bytes by what holds them, for one preset on one device; each was counted over a Llama layer and checked
    against measurements.

    h, i: hidden and intermediate size; d: of a head; a, kv: of all queries and of all keys; e: bytes of an
    activation.
    """

    def __init__(self, preset: Preset, spec: ModelSpec, device: torch.device) -> None:
        config: Any = spec.shape.get_text_config()
        self.preset, self.rmu, self.device = preset, preset.rmu, device
        self.weights = spec.weights(preset.rmu.modules)
        check_layers(preset.rmu, self.weights.layers)
        self.nf4 = preset.model.quantisation == "nf4"
        self.e = torch.empty((), dtype=resolve_dtype(preset.model, device)).element_size()
        self.vocabulary, self.h = config.vocab_size, config.hidden_size
        self.i = max(layer.intermediate for layer in self.weights.by_layer)
        heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
        self.d = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.a = heads * self.d
        self.kv = (getattr(config, "num_key_value_heads", None) or heads) * self.d

    def weights_held(self, layers: int | None) -> int:
        """Return the first layers without a head, or (None) the whole model."""
        weights, held = self.weights, self.weights.by_layer[:layers]
        other = (
            sum(layer.other for layer in held) + weights.embedding + (weights.head if layers is None else 0)
        )
        linear = sum(layer.linear for layer in held)
        whole = weights.learning(self.rmu) if self.rmu.trainable == "weights" else 0
        return int((linear - whole) * (NF4_BYTES if self.nf4 else self.e) + (other + whole) * self.e)

    def adapter(self) -> int:
        return self.weights.learning(self.rmu) * FLOAT32

    def loading(self) -> int:
        """Return the bytes in addition to the weights: the matrix that is being read, or brought to 4-bit
        piece by piece.
        """
        largest = self.weights.largest_linear
        piece = QUANTISING * min(PIECE, largest) if self.device.type == "cpu" else 0
        return largest * self.e + piece if self.nf4 else largest * STORED

    def dequantised(self) -> int:
        return max(self.weights.largest_linear, self.weights.experts) * self.e if self.nf4 else 0

    def forward(self, tokens: int, adapted: bool) -> int:
        """Return a forward pass without gradients at its widest: within an MLP, or an adapter."""
        residuals = (
            4 * self.h + 2 * self.d
        ) * self.e  # embeddings, the layer's input, the residual stream, the normed input; rotations
        plain = 2 * self.i * self.e * tokens + max(self.i * self.e * tokens, self.dequantised())
        adapters = [tokens * self._in_adapter(module) for module in self.weights.adapted(self.rmu) if adapted]
        return residuals * tokens + max(plain, *adapters, 0)

    def _in_adapter(self, module: Linear) -> int:
        """Return a token in an adapted module: its input or what its output will be multiplied with, the
        output, both in float32, and their sum.
        """
        copies = 3 if self.e < FLOAT32 and not self.nf4 else 2
        cast = FLOAT32 * module.inputs if self.e < FLOAT32 else 0
        return (
            self.e * (max(module.inputs, module.outputs) + module.outputs)
            + copies * FLOAT32 * module.outputs
            + cast
        )

    def evaluating(self, adapted: bool) -> int:
        evaluation = self.preset.evaluation
        corpora = [topic.corpus for topic in self.preset.topics.values()] + self.preset.retain.corpora
        tokens = (
            evaluation.planned_batch_tokens
            if evaluation.tasks or any(corpus.held_out for corpus in corpora)
            else 0
        )
        # Hidden states, those that are asked for; the logits of a few, the same in float32, and their
        # log-probabilities.
        widest = max(
            POSITIONS * self.vocabulary * (self.e + 2 * FLOAT32),
            self.head_copy() + POSITIONS * self.vocabulary * self.e,
        )
        logits = 2 * tokens * self.h * self.e + widest
        # For the divergence on retain text the unlearned side's hidden states wait while base runs.
        waiting = (
            tokens * self.h * self.e
            if adapted and any(corpus.held_out for corpus in self.preset.retain.corpora)
            else 0
        )
        return max(
            self.forward(tokens, adapted) + waiting,
            logits + waiting,
            self.answering() if evaluation.prompts else 0,
        )

    def answering(self) -> int:
        """Return a sample answer: the keys and values of all its tokens, and one dequantised matrix."""
        tokens = PROMPT_TOKENS + self.preset.evaluation.max_new_tokens
        return tokens * self.weights.layers * 2 * self.kv * self.e + max(
            self.forward(PROMPT_TOKENS, adapted=False), self.head_copy()
        )

    def head_copy(self) -> int:
        """Return the bytes of the head's weights in another layout, which oneDNN makes for each product in 16
        bits on a CPU.
        """
        return self.weights.embedding * self.e if self.device.type == "cpu" and self.e < FLOAT32 else 0

    def unlearning(self) -> int:
        """Learning parameters with gradient and moments, and the activations of the forget or the retain
        batch.
        """
        rmu = self.rmu
        forget = rmu.batch_size * max(topic.max_tokens for topic in self.preset.topics.values())
        retain = (rmu.retain_batch_size or rmu.batch_size) * self.preset.retain.max_tokens
        moments = 2 * FLOAT32 if rmu.optimizer == "adamw" else 2
        learning = self.weights.learning(rmu) * (FLOAT32 + FLOAT32 + moments)
        # While the retain batch is trained on, what left the target layer in the forget batch is kept for the
        # figures of the step.
        return learning + max(self.training(forget), self.training(retain) + forget * self.h * self.e)

    def training(self, tokens: int) -> int:
        """Return a batch at its peak, when the backward pass is in the last layer's MLP; trunk, frozen and
        updated activations stay throughout.
        """
        layers = self.rmu.target_layer - min(self.rmu.adapter_layers) + 1
        first, other = self.kept(first=True), self.kept(first=False) if layers > 1 else 0
        kept = (
            max(first, other) + layers * self.h * self.e
            if self.rmu.activation_checkpointing
            else first + (layers - 1) * other
        )
        gradients = (FLOAT32 + self.e) * self.i  # of the MLP's product: from the adapter and from the matrix
        backward = tokens * (kept + gradients + 3 * self.h * self.e) + self.dequantised()
        # The backward pass dequantizes a linear module again; experts it needs as the forward pass has left
        # them.
        experts = (
            (layers - 1) * self.weights.experts * self.e
            if self.nf4 and not self.rmu.activation_checkpointing
            else 0
        )
        return max(backward + experts, self.forward(tokens, adapted=False))

    def kept(self, first: bool) -> int:
        """Return bytes a token that autograd keeps of an updated layer; of the first only from its first
        adapter on, for its input learns nothing.
        """
        adapted, widths = self.weights.adapted(self.rmu), 2 * self.kv
        if self.rmu.padding == "paper":
            widths = 2 * self.a  # under a mask, keys and values are repeated for every query
        inputs = [(module.in_mlp, module.inputs) for module in adapted]
        # Float32 modules share their input.
        kept = FLOAT32 * sum(size for _, size in (inputs if self.e < FLOAT32 else set(inputs)))
        if not first:
            kept += FLOAT32 * self.h  # the input norm's
        if not first or any(not module.in_mlp for module in adapted):
            kept += self.e * (2 * self.a + widths) + FLOAT32 * self.h  # attention, and the MLP's norm
        if not first or any(module.inputs == self.h for module in adapted):
            kept += 3 * self.i * self.e  # gate, its activation, up
        return kept

    def cache(self) -> int:
        """Return the hidden-state cache where it is in this memory: of half the steps at most, for batches
        are kept that come again.
        """
        rmu = self.rmu
        if self.device.type != "cpu" or rmu.cache_in == "disk":
            return 0
        # Of the frozen path one sample.
        forget = (rmu.batch_size + 1) * max(topic.max_tokens for topic in self.preset.topics.values())
        retain = 2 * (rmu.retain_batch_size or rmu.batch_size) * self.preset.retain.max_tokens
        return min(int(rmu.cache_gib * 2**30), rmu.steps // 2 * (forget + retain) * self.h * self.e)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
