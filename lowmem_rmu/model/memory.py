"""The memory plan: what each stage needs, foretold from the model's shape alone; and what is in use now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from lowmem_rmu.model.adapters import check_layers
from lowmem_rmu.model.layers import decoder_layers, expert_shapes
from lowmem_rmu.model.loading import load_config, resolve_dtype, skeleton
from lowmem_rmu.model.logits import POSITIONS
from lowmem_rmu.model.quantisation import PIECE
from lowmem_rmu.presets import Preset, Rmu, is_local
from lowmem_rmu.runs import STAGES

# 4 bits, an 8-bit constant a block of 64, and a float32 a block of 256 of those (double quantisation, arXiv 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4  # bytes: adapters, their inputs and gradients, and what a norm works on
STORED = 2  # bytes of a weight as checkpoints hold it, read one at a time
QUANTISING = 16  # bytes a weight that bitsandbytes takes on a CPU while it brings a piece of a matrix to 4-bit; its GPU kernel takes none
BUFFERS = 4 * 2**20  # bytes on a CPU beside all tensors: threads' buffers, Python's objects; measured in every stage of the tiny model
PROMPT_TOKENS = 64  # of a sample prompt in its chat template


class Linear(NamedTuple):
    """A linear module of a decoder layer, or so many experts' matrices."""

    inputs: int
    outputs: int
    in_mlp: bool
    matrices: int


@dataclass(frozen=True)
class Weights:
    """Parameters by where they live: `layer_linear` and `layer_other` a decoder layer, `embedding`, `head` (0 where it is tied)."""

    layers: int
    layer_linear: int
    layer_other: int
    embedding: int
    head: int
    largest_linear: int
    experts: int
    """Of a layer's mixture of experts, which are among `layer_linear`: dequantised all at once."""
    adapted: tuple[Linear, ...]
    """What is adapted in a layer."""

    def total(self) -> int:
        return self.up_to(self.layers) + self.head

    def up_to(self, layers: int) -> int:
        """Of a model that is cut to its first layers."""
        return layers * (self.layer_linear + self.layer_other) + self.embedding

    def learning(self, rmu: Rmu) -> int:
        """Parameters that learn."""
        sizes = [each.inputs * each.outputs if rmu.trainable == "weights" else rmu.rank * (each.inputs + each.outputs) for each in self.adapted]
        return len(rmu.adapter_layers) * sum(size * each.matrices for size, each in zip(sizes, self.adapted, strict=True))


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
    """Bytes at the peak of a stage, or of all of them."""
    return max((need.total for need in needs if stage in (None, need.stage)), default=0)


def memory_in_use(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak`: of the GPU's allocator, or of this process (where its system tells no peak: now)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Starts a new peak for `memory_in_use`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def memory_available(device: torch.device) -> int:
    """Bytes that a run could have on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def config_for_plan(preset: Preset) -> PretrainedConfig:
    """The model's shape: of a model on the Hub the preset's own copy where it has one, so that no download is needed."""
    if preset.model.config is None or is_local(preset.model.name):
        return load_config(preset.model)
    shape = dict(preset.model.config)
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def count_weights(config: PretrainedConfig, modules: list[str]) -> Weights:
    """Counts the weights of the skeleton."""
    model = skeleton(config)
    layers = decoder_layers(model)
    experts = expert_shapes(layers[0])
    shapes = {name: module.weight.shape for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)} | experts
    adapted = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in modules}
    linear = sum(shape.numel() for shape in shapes.values())
    embeddings: Any = model.get_input_embeddings()
    embedding = embeddings.weight.numel()
    return Weights(
        layers=len(layers),
        layer_linear=linear,
        layer_other=sum(parameter.numel() for parameter in layers[0].parameters()) - linear,
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        largest_linear=max(shape.numel() for shape in shapes.values()),
        experts=sum(shape.numel() for shape in experts.values()),
        adapted=tuple(Linear(shape[-1], shape[-2], "attn" not in name, prod(shape[:-2])) for name, shape in adapted.items()),
    )


def plan(preset: Preset, device: torch.device, stages: Sequence[str] = STAGES) -> list[StageNeed]:
    """What each of the stages needs that work on the model. The first loads it: every layer where one of them evaluates."""
    needs, evaluates = Needs(preset, device), any(stage.startswith("evaluate") for stage in stages)
    loaded = needs.weights_held(None if evaluates else preset.rmu.target_layer + 1)
    planned = [
        StageNeed("evaluate-base", loaded, needs.evaluating(adapted=False)),
        StageNeed("unlearn", loaded, needs.unlearning(), needs.cache()),
        StageNeed("evaluate-unlearned", loaded + needs.adapter(), needs.evaluating(adapted=True)),
    ]
    planned = [need for need in planned if need.stage in stages]
    planned = [replace(need, working=max(need.working, needs.loading())) for need in planned[:1]] + planned[1:]
    return [replace(need, working=need.working + BUFFERS) for need in planned] if device.type == "cpu" else planned


class Needs:
    """Bytes by what holds them, for one preset on one device; each was counted over a Llama layer and checked against measurements.

    h, i: hidden and intermediate size; d: of a head; a, kv: of all queries and of all keys; e: bytes of an activation.
    """

    def __init__(self, preset: Preset, device: torch.device) -> None:
        config: Any = config_for_plan(preset)
        self.preset, self.rmu, self.device = preset, preset.rmu, device
        self.weights = count_weights(config, preset.rmu.modules)
        check_layers(preset.rmu, self.weights.layers)
        self.nf4 = preset.model.quantisation == "nf4"
        self.e = torch.empty((), dtype=resolve_dtype(preset.model, device)).element_size()
        self.vocabulary, self.h = config.vocab_size, config.hidden_size
        self.i = config.intermediate_size * getattr(config, "num_experts_per_tok", 1)
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.a = config.num_attention_heads * self.d
        self.kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * self.d

    def weights_held(self, layers: int | None) -> int:
        """The first layers without a head, or (None) the whole model."""
        weights, count = self.weights, self.weights.layers if layers is None else layers
        other = count * weights.layer_other + weights.embedding + (weights.head if layers is None else 0)
        linear = count * weights.layer_linear
        whole = weights.learning(self.rmu) if self.rmu.trainable == "weights" else 0
        return int((linear - whole) * (NF4_BYTES if self.nf4 else self.e) + (other + whole) * self.e)

    def adapter(self) -> int:
        return self.weights.learning(self.rmu) * FLOAT32

    def loading(self) -> int:
        """Beside the weights: the matrix that is being read, or brought to 4-bit piece by piece."""
        largest = self.weights.largest_linear
        piece = QUANTISING * min(PIECE, largest) if self.device.type == "cpu" else 0
        return largest * self.e + piece if self.nf4 else largest * STORED

    def dequantised(self) -> int:
        return max(self.weights.largest_linear, self.weights.experts) * self.e if self.nf4 else 0

    def forward(self, tokens: int, adapted: bool) -> int:
        """A forward pass without gradients at its widest: within an MLP, or an adapter."""
        residuals = (4 * self.h + 2 * self.d) * self.e  # embeddings, the layer's input, the residual stream, the normed input; rotations
        plain = 2 * self.i * self.e * tokens + max(self.i * self.e * tokens, self.dequantised())
        adapters = [tokens * self._in_adapter(module) for module in self.weights.adapted if adapted]
        return residuals * tokens + max(plain, *adapters, 0)

    def _in_adapter(self, module: Linear) -> int:
        """A token in an adapted module: its input or what its output will be multiplied with, the output, both in float32, and their sum."""
        copies = 3 if self.e < FLOAT32 and not self.nf4 else 2
        cast = FLOAT32 * module.inputs if self.e < FLOAT32 else 0
        return self.e * (max(module.inputs, module.outputs) + module.outputs) + copies * FLOAT32 * module.outputs + cast

    def evaluating(self, adapted: bool) -> int:
        evaluation = self.preset.evaluation
        corpora = [topic.corpus for topic in self.preset.topics.values()] + self.preset.retain.corpora
        tokens = evaluation.planned_batch_tokens if evaluation.tasks or any(corpus.held_out for corpus in corpora) else 0
        # Hidden states, those that are asked for; the logits of a few, the same in float32, and their log-probabilities.
        logits = 2 * tokens * self.h * self.e + POSITIONS * self.vocabulary * (self.e + 2 * FLOAT32)
        # For the divergence on retain text the unlearned side's hidden states wait while base runs.
        waiting = tokens * self.h * self.e if adapted and any(corpus.held_out for corpus in self.preset.retain.corpora) else 0
        return max(self.forward(tokens, adapted) + waiting, logits + waiting, self.answering() if evaluation.prompts else 0)

    def answering(self) -> int:
        """A sample answer: the keys and values of all its tokens, and one dequantised matrix."""
        tokens = PROMPT_TOKENS + self.preset.evaluation.max_new_tokens
        return tokens * self.weights.layers * 2 * self.kv * self.e + self.forward(PROMPT_TOKENS, adapted=False)

    def unlearning(self) -> int:
        """Learning parameters with gradient and moments, and the activations of the forget or the retain batch."""
        rmu = self.rmu
        forget = rmu.batch_size * max(topic.max_tokens for topic in self.preset.topics.values())
        retain = (rmu.retain_batch_size or rmu.batch_size) * self.preset.retain.max_tokens
        moments = 2 * FLOAT32 if rmu.optimizer == "adamw" else 2
        learning = self.weights.learning(rmu) * (FLOAT32 + FLOAT32 + moments)
        # While the retain batch is trained on, what left the target layer in the forget batch is kept for the figures of the step.
        return learning + max(self.training(forget), self.training(retain) + forget * self.h * self.e)

    def training(self, tokens: int) -> int:
        """A batch at its peak, when the backward pass is in the last layer's MLP; trunk, frozen and updated activations stay throughout."""
        layers = self.rmu.target_layer - min(self.rmu.adapter_layers) + 1
        first, other = self.kept(first=True), self.kept(first=False) if layers > 1 else 0
        kept = max(first, other) + layers * self.h * self.e if self.rmu.activation_checkpointing else first + (layers - 1) * other
        gradients = (FLOAT32 + self.e) * self.i  # of the MLP's product: from the adapter and from the matrix
        backward = tokens * (kept + gradients + 3 * self.h * self.e) + self.dequantised()
        # The backward pass dequantises a linear module anew; experts it needs as the forward pass has left them.
        experts = (layers - 1) * self.weights.experts * self.e if self.nf4 and not self.rmu.activation_checkpointing else 0
        return max(backward + experts, self.forward(tokens, adapted=False))

    def kept(self, first: bool) -> int:
        """Bytes a token that autograd keeps of an updated layer; of the first only from its first adapter on, for its input learns nothing."""
        adapted, widths = self.weights.adapted, 2 * self.kv
        if self.rmu.padding == "paper":
            widths = 2 * self.a  # under a mask, keys and values are repeated for every query
        inputs = [(module.in_mlp, module.inputs) for module in adapted]
        kept = FLOAT32 * sum(size for _, size in (inputs if self.e < FLOAT32 else set(inputs)))  # float32 modules share their input
        if not first:
            kept += FLOAT32 * self.h  # the input norm's
        if not first or any(not module.in_mlp for module in adapted):
            kept += self.e * (2 * self.a + widths) + FLOAT32 * self.h  # attention, and the MLP's norm
        if not first or any(module.inputs == self.h for module in adapted):
            kept += 3 * self.i * self.e  # gate, its activation, up
        return kept

    def cache(self) -> int:
        """The hidden-state cache where it is in this memory: of half the steps at most, for batches are kept that come again."""
        rmu = self.rmu
        if self.device.type != "cpu" or rmu.cache_in == "disk":
            return 0
        forget = (rmu.batch_size + 1) * max(topic.max_tokens for topic in self.preset.topics.values())  # of the frozen path one sample
        retain = 2 * (rmu.retain_batch_size or rmu.batch_size) * self.preset.retain.max_tokens
        return min(int(rmu.cache_gib * 2**30), rmu.steps // 2 * (forget + retain) * self.h * self.e)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
