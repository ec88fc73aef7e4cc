"""GGUF files for llama.cpp, Ollama and LM Studio: a checkpoint with its tokenizer, weight by weight, or a
LoRA adapter alone.

Written with llama.cpp's own `gguf` package. llama.cpp's converter itself is in no package of its makers, has
no q4_0 and nowhere to add an update; what it decides for Llama and Mistral (names, the order of rotary
weights, types) is decided likewise here.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.gguf.tokenizer import add_tokenizer, end_tokens
from lowmem_rmu.model.changes import BEFORE, FIRST_FACTOR, SECOND_FACTOR
from lowmem_rmu.model.saved import WEIGHTS, read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import replaced
from lowmem_rmu.weights.shards import open_weights

Kind = Literal["f16", "bf16", "q8_0", "q4_0"]
Change = Callable[[str, Tensor], Tensor]
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies are the same however long the text is."""
ROPE_FACTORS = "rope_freqs.weight"
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
ROOM_FOR_WORDS = 32 * 2**20  # bytes, more than a tokenizer and the names take
LORA_ONLY = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias")
"""Settings of PEFT that change what an adapter does and that a GGUF adapter cannot say."""


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: its name there and in the checkpoint, its shape, and what it is stored as."""

    name: str
    source: str
    shape: tuple[int, ...]
    stored: GGMLQuantizationType

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(quant_shape_to_byte_shape(self.shape, self.stored))


def write_gguf(checkpoint: Path, to: Path, kind: Kind, change: Change | None = None) -> None:
    """Write a checkpoint's folder and its tokenizer as one GGUF file, which is whole or is not there.

    `change` gets every weight by its name in the checkpoint, in float32, and gives what is stored in its
    place. No more than one weight is in memory at a time. Raises UserError for what llama.cpp would not run
    to the same effect, for a checkpoint whose weights do not fit its config.json, and for too little disk
    space.
    """
    spec = ModelSpec(ModelSettings(name=str(checkpoint.absolute())))
    check_known(spec)
    tokenizer, read = spec.tokenizer, spec.checkpoint()
    config, tensors = read.config, read.tensors  # a head that the checkpoint stores is none that is tied
    planned = _plan(spec, config, kind)
    _check_space(to, sum(tensor.size for tensor in planned))
    with replaced(to, durable=True) as unfinished, _writer(unfinished) as writer:
        writer.add_type(GGUFType.MODEL)
        writer.add_name(to.stem)
        writer.add_file_type(TYPES[kind][1])
        _add_shape(writer, config)
        add_tokenizer(writer, tokenizer, end_tokens(checkpoint, tokenizer), config.vocab_size)
        with open_weights(sorted({tensor.file for tensor in tensors.values()}), None) as weights:
            _check_weights(checkpoint, planned, weights)
            _write_tensors(writer, planned, lambda tensor: _read(config, weights, change, tensor))


def check_known(spec: ModelSpec) -> None:
    """Raise UserError for an architecture, or a setting of one, that llama.cpp does not compute in the same
    way.
    """
    config: Any = spec.config
    architecture = (config.architectures or [type(config).__name__])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{spec.name} is a {architecture}: GGUF files are written of {' and '.join(ARCHITECTURES)} only.",
            "Export it merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    if (rope_type := config.rope_parameters["rope_type"]) not in ROPE_TYPES:
        raise UserError(
            f"{spec.name} has rotary positions of type {rope_type}, which no GGUF file can say.",
            "Export it merged instead.",
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"{spec.name} computes {config.hidden_act} where llama.cpp computes silu.",
            "Export it merged instead.",
        )


def _plan(spec: ModelSpec, config: PretrainedConfig, kind: Kind) -> list[_Planned]:
    """Return all tensors of the file."""
    shapes = _shapes(spec, config)
    if config.rope_parameters["rope_type"] != "default":
        shapes[ROPE_FACTORS] = (head_size(config) // 2,)
    return [
        _Planned(_gguf_name(config, name), name, shape, _stored_as(name, shape, kind))
        for name, shape in shapes.items()
    ]


def _shapes(spec: ModelSpec, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by their names in the checkpoint, without a head that is tied to the
    embeddings.
    """
    shapes = {name: tuple(weight.shape) for name, weight in spec.skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _stored_as(name: str, shape: tuple[int, ...], kind: Kind) -> GGMLQuantizationType:
    """Return how each tensor is stored: vectors in float32. With q4_0, embeddings and head are q8_0: they
    suffer most (in llama.cpp's own mixture they are q6_K).
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind in ("q8_0", "q4_0") and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if kind == "q4_0" and ".layers." not in name else TYPES[kind][0]


def _gguf_name(config: PretrainedConfig, name: str) -> str:
    known = _names(config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if known is None:
        raise UserError(
            f"llama.cpp knows no weight like {name} in a Llama.",
            "Export the model merged instead.",
        )
    return known


@cache
def _names(layers: int) -> TensorNameMap:
    return get_tensor_name_map(MODEL_ARCH.LLAMA, layers)


def _check_space(to: Path, size: int) -> None:
    needed, free = size + ROOM_FOR_WORDS, shutil.disk_usage(to.parent).free
    if free < needed:
        raise UserError(
            f"{to} takes {needed / 1000000000.0:.2f} GB, but {free / 1000000000.0:.2f} GB are free there.",
            "Make room, or choose another folder or a smaller kind: q8_0 takes half of f16, q4_0 about a "
            "quarter.",
        )


@contextmanager
def _writer(path: Path) -> Iterator[GGUFWriter]:
    writer = GGUFWriter(path, "llama")  # to llama.cpp a Mistral is a Llama
    try:
        yield writer
    finally:
        writer.close()


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_shape(writer: GGUFWriter, config: PretrainedConfig) -> None:
    # llama.cpp has no sliding window in a Llama: up to the window's length it computes the same.
    writer.add_context_length(
        min(
            config.max_position_embeddings,
            getattr(config, "sliding_window", None) or config.max_position_embeddings,
        )
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if (attention := _rope_factors(config)[1]) != 1.0:
        writer.add_rope_scaling_attn_factors(attention)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _rope_factors(config: PretrainedConfig) -> tuple[Tensor, float]:
    """Return the divisor of each rotary frequency `(head / 2,)` and the factor of queries and keys, as
    transformers computes them.

    One way for every type of scaling: llama.cpp's own settings of linear and YaRN say less than those of
    transformers.
    """
    head, rope = head_size(config), config.rope_parameters
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    if rope["rope_type"] == "default":
        return torch.ones_like(plain), 1.0
    scaled, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return plain / scaled, attention


def _check_weights(checkpoint: Path, planned: list[_Planned], weights: dict[str, Any]) -> None:
    missing = [
        tensor.source for tensor in planned if tensor.source not in weights and tensor.source != ROPE_FACTORS
    ]
    if missing:
        raise UserError(
            f"The checkpoint {checkpoint} lacks {len(missing)} weights, {min(missing)} among them.",
            "Download or copy it again.",
        )


def _read(
    config: PretrainedConfig, weights: dict[str, Any], change: Change | None, tensor: _Planned
) -> Tensor:
    """Return a weight in float32, as it is stored: changed, and with rotary pairs next to each other."""
    if tensor.source == ROPE_FACTORS:
        return _rope_factors(config)[0]
    weight: Tensor = weights[tensor.source][...].float()
    if tuple(weight.shape) != tensor.shape:
        raise UserError(
            f"{tensor.source} has the shape {tuple(weight.shape)}, but config.json makes it {tensor.shape}: "
            "they are of two models."
        )
    return in_pairs(config, tensor.source, change(tensor.source, weight).float() if change else weight)


def in_pairs(config: PretrainedConfig, name: str, weight: Tensor) -> Tensor:
    """Return rows of a query's or key's weight `(heads * size, ...)` in llama.cpp's order: what turns
    together, i and i + size / 2, is adjacent.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    return (
        weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    )


def _write_tensors(writer: GGUFWriter, planned: list[_Planned], read: Callable[[_Planned], Tensor]) -> None:
    """Write the names of all tensors, then one tensor after the other."""
    for tensor in planned:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(quantize(read(tensor).contiguous().numpy(), tensor.stored))


def write_gguf_adapter(adapter: Path, checkpoint: Path, to: Path) -> None:
    """Write a LoRA adapter alone as a GGUF file in float32, for any GGUF file of the checkpoint that it was
    trained on.

    Raises UserError for an adapter that is more than LoRA, or of another model than the checkpoint's.
    """
    spec = ModelSpec(ModelSettings(name=str(checkpoint.absolute())))
    check_known(spec)
    config = spec.config
    lora, shapes = _plain_lora(adapter), _shapes(spec, config)
    with replaced(to, durable=True) as unfinished, _writer(unfinished) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(to.stem)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(lora.lora_alpha))
        for name, (a, b) in _low_rank_pairs(adapter).items():
            if shapes.get(name) != (shape := (b.shape[0], a.shape[1])):
                raise UserError(
                    f"The adapter {adapter} changes {name} of {shape}, which {checkpoint} has not.",
                    "Give its own base model.",
                )
            writer.add_tensor(f"{_gguf_name(config, name)}.lora_a", a.contiguous().numpy())
            writer.add_tensor(
                f"{_gguf_name(config, name)}.lora_b", in_pairs(config, name, b).contiguous().numpy()
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _plain_lora(adapter: Path) -> LoraConfig:
    read_adapter_settings(adapter)
    config = LoraConfig.from_pretrained(str(adapter))
    if config.modules_to_save:
        raise UserError(
            f"The adapter {adapter} holds whole matrices, which a GGUF adapter cannot.",
            "Export the merged model as GGUF instead.",
        )
    if beyond := [name for name in LORA_ONLY if getattr(config, name)]:
        raise UserError(
            f"The adapter {adapter} uses {', '.join(beyond)}, which a GGUF adapter cannot say.",
            "Export the merged model as GGUF instead.",
        )
    return config


def _low_rank_pairs(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """`(rank, in)` and `(out, rank)` in float32 by the weight's name in the checkpoint."""
    stored = {
        name.removeprefix(BEFORE): weight.float() for name, weight in load_file(adapter / WEIGHTS).items()
    }
    modules = [name.removesuffix(FIRST_FACTOR) for name in stored if name.endswith(FIRST_FACTOR)]
    return {
        f"{module}.weight": (stored[module + FIRST_FACTOR], stored[module + SECOND_FACTOR])
        for module in modules
    }
