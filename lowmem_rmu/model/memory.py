"""The memory plan: what each stage needs, foretold from the model's shape alone; and what is in use now."""

from dataclasses import dataclass
from math import prod
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import check_layers
from lowmem_rmu.model.layers import decoder_layers, expert_shapes
from lowmem_rmu.model.loading import load_config, resolve_dtype
from lowmem_rmu.presets import Preset

# 4 bits, an 8-bit constant a block of 64, and a float32 a block of 256 of those (double quantisation, arXiv 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Values a token that a layer keeps for its backward pass, or holds at once in a forward pass: multiples of its hidden and
# intermediate size, counted over a Llama layer (norms, projections, attention, gated MLP; dequantised weights come on top).
TRAIN_HIDDEN, TRAIN_INTERMEDIATE = 14, 5
FORWARD_HIDDEN, FORWARD_INTERMEDIATE = 6, 3


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
    adapter_inputs_and_outputs: int
    """Sum of in- and out-features of the adapted modules of one layer: times the rank, LoRA's parameters."""

    def total(self) -> int:
        return self.up_to(self.layers) + self.head

    def up_to(self, layers: int) -> int:
        """Of a model that is cut to its first layers."""
        return layers * (self.layer_linear + self.layer_other) + self.embedding


@dataclass(frozen=True)
class StageNeed:
    """Bytes a stage needs on its device, beyond the libraries themselves."""

    stage: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.working


def memory_in_use(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_available(device: torch.device) -> int:
    """Bytes that a run could have on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def config_for_plan(preset: Preset) -> PretrainedConfig:
    """The model's shape: the preset's own copy where it has one, so that no download is needed, else the model's."""
    if preset.model.config is None:
        return load_config(preset.model)
    shape = dict(preset.model.config)
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights, on torch's meta device: nothing is allocated."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def count_weights(config: PretrainedConfig, modules: list[str]) -> Weights:
    """Counts the weights of the skeleton."""
    model = skeleton(config)
    layers = decoder_layers(model)
    experts = expert_shapes(layers[0])
    shapes = {name: module.weight.shape for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)} | experts
    adapted = [shape for name, shape in shapes.items() if name.rpartition(".")[2] in modules]
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
        adapter_inputs_and_outputs=sum(prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in adapted),
    )


def plan(preset: Preset, device: torch.device, whole_model: bool) -> list[StageNeed]:
    """What each stage needs. `whole_model`: the run also evaluates, so every layer stays loaded while it trains."""
    config = config_for_plan(preset)
    weights = count_weights(config, preset.rmu.modules)
    check_layers(preset.rmu, weights.layers)
    element = torch.empty((), dtype=resolve_dtype(preset.model, device)).element_size()
    linear_bytes = NF4_BYTES if preset.model.quantisation == "nf4" else element

    def held(layers: int, head: bool) -> int:
        other = layers * weights.layer_other + weights.embedding + (weights.head if head else 0)
        return int(layers * weights.layer_linear * linear_bytes + other * element)

    everything = held(weights.layers, head=True)
    dequantised = max(weights.largest_linear, weights.experts) * element if preset.model.quantisation == "nf4" else 0
    # The backward pass dequantises a linear module anew; experts it needs as the forward pass has left them.
    layers_kept = 0 if preset.rmu.activation_checkpointing else preset.rmu.target_layer - min(preset.rmu.adapter_layers)
    kept = layers_kept * weights.experts * element if preset.model.quantisation == "nf4" else 0
    adapter = len(preset.rmu.adapter_layers) * preset.rmu.rank * weights.adapter_inputs_and_outputs * 4
    answering = preset.evaluation.batch_tokens * _forward_values(config) * element + dequantised
    training = _training_bytes(preset, config, element) + dequantised + kept + 4 * adapter  # weight, gradient, AdamW's two moments
    return [
        StageNeed("evaluate-base", everything, answering),
        StageNeed("unlearn", everything if whole_model else held(preset.rmu.target_layer + 1, head=False), training),
        StageNeed("evaluate-unlearned", everything + adapter, answering),
    ]


def _forward_values(config: PretrainedConfig) -> int:
    return FORWARD_HIDDEN * config.hidden_size + FORWARD_INTERMEDIATE * _intermediate_values(config)


def _intermediate_values(config: PretrainedConfig) -> int:
    """Of a token in an MLP: in a mixture it goes through several experts."""
    return int(config.intermediate_size * getattr(config, "num_experts_per_tok", 1))


def _training_bytes(preset: Preset, config: PretrainedConfig, element: int) -> int:
    """Activations of the larger of the two batches; the forget and the retain loss run backwards one after the other."""
    rmu = preset.rmu
    tokens = max(
        rmu.batch_size * max(topic.max_tokens for topic in preset.topics.values()),
        (rmu.retain_batch_size or rmu.batch_size) * preset.retain.max_tokens,
    )
    layers = rmu.target_layer - min(rmu.adapter_layers) + 1
    one_layer = TRAIN_HIDDEN * config.hidden_size + TRAIN_INTERMEDIATE * _intermediate_values(config)
    kept = one_layer + layers * config.hidden_size if rmu.activation_checkpointing else layers * one_layer
    return tokens * (kept * element + 4 * config.hidden_size * 4)  # and trunk, frozen, target and their difference in float32


def out_of_memory(preset: Preset, device: torch.device, stage: str) -> UserError:
    """What to lower, and by how much, after the device ran out of memory."""
    needs = {need.stage: need for need in plan(preset, device, whole_model=True)}
    need = needs.get(stage, needs["unlearn"])
    free = max(memory_available(device), 0)
    lines = [f"Out of memory in the stage {stage}: the plan foretells {gib(need.total)}, {gib(free)} are free on {device} now."]
    if stage == "unlearn":
        half = max(1, preset.rmu.batch_size // 2)
        saved = need.working - _unlearn_working(preset, device, batch_size=half, retain_batch_size=half)
        if saved > 0:
            lines.append(f"Lower the batch: --set rmu.batch_size={half} --set rmu.retain_batch_size={half} saves about {gib(saved)}.")
        saved = need.working - _unlearn_working(preset, device, activation_checkpointing=True)
        if saved > 0:
            lines.append(f"Recompute activations: --set rmu.activation_checkpointing=true saves about {gib(saved)}, and takes longer.")
        alone = plan(preset, device, whole_model=False)[1]
        lines.append(f"Train with the lower layers alone: --stages unlearn takes {gib(alone.total)} in all.")
    else:
        half = max(1, preset.evaluation.batch_tokens // 2)
        lines.append(f"Lower the batch: --set evaluation.batch_tokens={half} saves about {gib(need.working // 2)}.")
    return UserError("\n".join(lines))


def _unlearn_working(preset: Preset, device: torch.device, **changes: object) -> int:
    changed = preset.model_copy(update={"rmu": preset.rmu.model_copy(update=changes)})
    return plan(changed, device, whole_model=True)[1].working


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
