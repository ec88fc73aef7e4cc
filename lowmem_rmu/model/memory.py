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

from lowmem_rmu.errors import UserError
from lowmem_rmu.model import shards
from lowmem_rmu.model.adapters import check_layers
from lowmem_rmu.model.layers import decoder_layers, expert_shapes, linear_shapes
from lowmem_rmu.model.loading import check_sizes, check_supported, load_config, resolve_dtype, skeleton
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
class LayerWeights:
    """Parameters of one decoder layer. Layers of one model can differ: dense below, a mixture of experts above (DeepSeek-V3)."""

    linear: int
    other: int
    largest_linear: int
    experts: int
    """Of its mixture of experts, which are among `linear`: dequantised all at once."""
    intermediate: int
    """Width of the MLP for one token: of a mixture, that of all experts which a token takes."""
    adapted: tuple[Linear, ...]
    """What an adapter changes where the layer has one."""


@dataclass(frozen=True)
class Weights:
    """Parameters by where they live: decoder layers, `embedding`, `head` (0 where it is tied)."""

    by_layer: tuple[LayerWeights, ...]
    embedding: int
    head: int

    @property
    def layers(self) -> int:
        return len(self.by_layer)

    @property
    def largest_linear(self) -> int:
        return max(layer.largest_linear for layer in self.by_layer)

    @property
    def experts(self) -> int:
        """The largest mixture of experts of a layer."""
        return max(layer.experts for layer in self.by_layer)

    def total(self) -> int:
        return self.up_to(self.layers) + self.head

    def up_to(self, layers: int) -> int:
        """Of a model that is cut to its first layers."""
        return sum(layer.linear + layer.other for layer in self.by_layer[:layers]) + self.embedding

    def learning(self, rmu: Rmu) -> int:
        """Parameters that learn."""
        total = 0
        for module in (module for index in rmu.adapter_layers for module in self.by_layer[index].adapted):
            low_rank = rmu.rank * (module.inputs + module.outputs)
            total += module.matrices * (module.inputs * module.outputs if rmu.trainable == "weights" else low_rank)
        return total

    def adapted(self, rmu: Rmu) -> tuple[Linear, ...]:
        """What is adapted in the adapter layer where that is widest."""
        layers = [self.by_layer[index].adapted for index in rmu.adapter_layers]
        return max(layers, key=lambda adapted: sum(module.inputs + module.outputs for module in adapted))


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
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Starts a new peak for `memory_in_use`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5", encoding="ascii")


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
    check_sizes(preset.model.name, shape)
    try:
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    except Exception as error:  # each model's configuration checks its own values, and raises what it likes
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"model.config of the preset is no configuration of a model: {reason}.",
            "Leave it out, or correct it.",
        ) from error
    check_supported(preset.model.name, config)
    return config


def count_weights(config: PretrainedConfig, modules: list[str]) -> Weights:
    """Count the weights of the skeleton."""
    model = skeleton(config)
    embeddings: Any = model.get_input_embeddings()
    embedding = embeddings.weight.numel()
    return Weights(
        by_layer=tuple(_count_layer(layer, modules, config.get_text_config()) for layer in decoder_layers(model)),
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
    )


def _count_layer(layer: nn.Module, modules: list[str], config: Any) -> LayerWeights:
    hidden, experts = config.hidden_size, expert_shapes(layer)
    shapes = linear_shapes(layer) | experts
    linear = sum(shape.numel() for shape in shapes.values())
    # A name that experts have means them alone, not the shared expert.
    of_experts = {name.rpartition(".")[2] for name in experts}
    adapted = {
        name: shape for name, shape in shapes.items()
        if (leaf := name.rpartition(".")[2]) in modules and (name in experts or leaf not in of_experts)
    }  # fmt: skip
    # Outside of attention, what leads to or from the hidden size has the MLP's width on its other side. Fused gates have it twice.
    widths = [hidden]
    for name, shape in shapes.items():
        if hidden in shape[-2:] and not _in_attention(name) and "gate" not in name:
            width = shape[-1] * shape[-2] // hidden
            widths.append(width * getattr(config, "num_experts_per_tok", 1) if name in experts else width)
    return LayerWeights(
        linear=linear,
        other=sum(parameter.numel() for parameter in layer.parameters()) - linear,
        largest_linear=max((shape.numel() for shape in shapes.values()), default=0),
        experts=sum(shape.numel() for shape in experts.values()),
        intermediate=max(widths),
        adapted=tuple(Linear(shape[-1], shape[-2], not _in_attention(name), prod(shape[:-2])) for name, shape in adapted.items()),
    )


def _in_attention(module_name: str) -> bool:
    return "attn" in module_name or "attention" in module_name


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
    if device.type == "cpu":
        return [replace(need, working=need.working + BUFFERS + _kept_by_libc(need.working)) for need in planned]
    return planned


def _kept_by_libc(working: int) -> int:
    """Return what glibc keeps of freed blocks for later: at most twice the largest block that it keeps, as far as there was so much."""
    return min(working // 2, 2 * shards.LARGEST_KEPT)


class Needs:
    """Bytes by what holds them, for one preset on one device; each was counted over a Llama layer and checked against measurements.

    h, i: hidden and intermediate size; d: of a head; a, kv: of all queries and of all keys; e: bytes of an activation.
    """

    def __init__(self, preset: Preset, device: torch.device) -> None:
        whole = config_for_plan(preset)
        config: Any = whole.get_text_config()
        self.preset, self.rmu, self.device = preset, preset.rmu, device
        self.weights = count_weights(whole, preset.rmu.modules)
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
        """The first layers without a head, or (None) the whole model."""
        weights, held = self.weights, self.weights.by_layer[:layers]
        other = sum(layer.other for layer in held) + weights.embedding + (weights.head if layers is None else 0)
        linear = sum(layer.linear for layer in held)
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
        adapters = [tokens * self._in_adapter(module) for module in self.weights.adapted(self.rmu) if adapted]
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
        widest = max(POSITIONS * self.vocabulary * (self.e + 2 * FLOAT32), self.head_copy() + POSITIONS * self.vocabulary * self.e)
        logits = 2 * tokens * self.h * self.e + widest
        # For the divergence on retain text the unlearned side's hidden states wait while base runs.
        waiting = tokens * self.h * self.e if adapted and any(corpus.held_out for corpus in self.preset.retain.corpora) else 0
        return max(self.forward(tokens, adapted) + waiting, logits + waiting, self.answering() if evaluation.prompts else 0)

    def answering(self) -> int:
        """A sample answer: the keys and values of all its tokens, and one dequantised matrix."""
        tokens = PROMPT_TOKENS + self.preset.evaluation.max_new_tokens
        return tokens * self.weights.layers * 2 * self.kv * self.e + max(self.forward(PROMPT_TOKENS, adapted=False), self.head_copy())

    def head_copy(self) -> int:
        """Return the bytes of the head's weights in another layout, which oneDNN makes for each product in 16 bits on a CPU."""
        return self.weights.embedding * self.e if self.device.type == "cpu" and self.e < FLOAT32 else 0

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
        adapted, widths = self.weights.adapted(self.rmu), 2 * self.kv
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
