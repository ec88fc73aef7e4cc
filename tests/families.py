"""Families of architectures, each as a tiny random model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rmu.config.schema import ModelSettings

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (SHAPE, "down_proj"),
    "mistral": (SHAPE | {"sliding_window": 16}, "down_proj"),
    "qwen2": (SHAPE | {"tie_word_embeddings": True}, "down_proj"),
    "qwen3": (SHAPE | {"head_dim": 16}, "down_proj"),
    "gemma2": (SHAPE | {"head_dim": 16, "sliding_window": 16}, "down_proj"),
    "gemma3_text": (SHAPE | {"head_dim": 16, "sliding_window": 16}, "down_proj"),
    "phi3": (SHAPE, "down_proj"),
    "mixtral": (SHAPE | {"num_local_experts": 4}, "down_proj"),
    "qwen2_moe": (SHAPE | EXPERTS | {"shared_expert_intermediate_size": 16}, "down_proj"),
    "qwen3_moe": (SHAPE | EXPERTS | {"head_dim": 16, "output_router_logits": True}, "down_proj"),
    "olmoe": (SHAPE | EXPERTS, "down_proj"),
    "gpt_oss": (
        SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
        "down_proj",
    ),
    "deepseek_v3": (
        SHAPE
        | EXPERTS
        | LATENT
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        "down_proj",
    ),
    "gpt_neox": (SHAPE, "dense_4h_to_h"),
    "falcon": (SHAPE | {"new_decoder_architecture": False, "alibi": False}, "dense_4h_to_h"),
    "bloom": (SHAPE, "dense_4h_to_h"),
    "gpt2": (SHAPE | {"n_positions": 512}, "c_proj"),
    "opt": (SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 16}, "fc2"),
    "lfm2": (SHAPE | {"full_attn_idxs": [1]}, "w2"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4}, "in_proj"),
}
"""By the model's type, its shape and the module that gets an adapter."""
NO_4_BIT = ("mamba",)


@dataclass(frozen=True)
class Family:
    """A tiny random model of an architecture."""

    name: str
    folder: Path
    module: str

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings(name=str(self.folder), quantisation="none", dtype="float32")
