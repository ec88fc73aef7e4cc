"""GGUF files read back: every weight, what it is stored as, adapters alone, and what is refused."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.gguf.writer import Kind, in_pairs, write_gguf, write_gguf_adapter
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.loading import load_model
from tests.texts import plain

TINY = Path(__file__).parents[3] / "lowmem_rmu/tiny/model"
KINDS: tuple[Kind, ...] = get_args(Kind)
SAME_NAME = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Save = Callable[[PretrainedConfig, Path], Path]


def source_of(name: str) -> str:
    """The checkpoint's name of a GGUF tensor, written down by hand."""
    if name in SAME_NAME:
        return SAME_NAME[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{IN_A_LAYER[part]}.{suffix}"


def in_the_checkpoints_order(name: str, weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the pairing of rotary rows: of a head, first all even rows, then all odd ones."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return weight
    return np.concatenate([rows for head in np.split(weight, heads) for rows in (head[0::2], head[1::2])])


def read_back(path: Path) -> dict[str, np.ndarray]:
    """Every tensor in float32."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def stored_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def settings_in(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def llama(tmp_path: Path, save_random: Save, **changes: Any) -> Path:
    shape: dict[str, Any] = {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return save_random(
        LlamaConfig(**shape | {"num_key_value_heads": 2, "max_position_embeddings": 256} | changes),
        tmp_path / "llama",
    )


def changed_config(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return to


def test_every_weight_of_the_tiny_model_is_there_in_f16(tmp_path: Path) -> None:
    write_gguf(TINY, to := tmp_path / "tiny.gguf", "f16")
    stored, checkpoint = read_back(to), load_file(TINY / "model.safetensors")
    assert {source_of(name) for name in stored} == set(checkpoint)
    for name, weight in stored.items():
        expected = checkpoint[source_of(name)].float().numpy()
        rounded = expected if weight.ndim == 1 else expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(in_the_checkpoints_order(name, weight, heads=4), rounded), name


def test_rows_that_turn_together_are_adjacent() -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    rows = torch.arange(8)
    assert in_pairs(config, "model.layers.0.self_attn.q_proj.weight", rows).tolist() == [
        0,
        2,
        1,
        3,
        4,
        6,
        5,
        7,
    ], "two heads of four rows"
    assert in_pairs(config, "model.layers.0.self_attn.k_proj.bias", rows[:4]).tolist() == [0, 2, 1, 3]
    assert in_pairs(config, "model.layers.0.self_attn.v_proj.weight", rows).tolist() == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_of_the_kind_that_was_asked_for(
    kind: Kind, tmp_path: Path, small_model_folder: Path
) -> None:
    write_gguf(small_model_folder, to := tmp_path / "small.gguf", kind)
    types = stored_types(to)
    assert {type_ for name, type_ in types.items() if "norm" in name} == {"F32"}
    outside = {types["token_embd.weight"], types["output.weight"]}
    assert outside == ({"Q8_0"} if kind == "q4_0" else {kind.upper()})
    assert {type_ for name, type_ in types.items() if name.startswith("blk.") and "norm" not in name} == {
        kind.upper()
    }


@pytest.mark.parametrize(("kind", "steps"), [("f16", 2**11), ("bf16", 2**8), ("q8_0", 2 * 127), ("q4_0", 8)])
def test_weights_are_as_near_as_the_kind_allows(
    kind: Kind, steps: int, tmp_path: Path, small_model_folder: Path
) -> None:
    write_gguf(small_model_folder, to := tmp_path / "small.gguf", kind)
    expected = (
        load_file(small_model_folder / "model.safetensors")["model.layers.3.mlp.down_proj.weight"]
        .float()
        .numpy()
    )
    blocks, stored = expected.reshape(-1, 32), read_back(to)["blk.3.ffn_down.weight"].reshape(-1, 32)
    # The scale itself is rounded to f16.
    allowed = np.abs(blocks).max(axis=1, keepdims=True) * (1 / steps + 2**-11)
    assert (np.abs(stored - blocks) <= allowed).all()
    assert (stored != blocks).any() or kind == "f16", "something was rounded"


def test_rows_that_no_block_divides_stay_in_f16(tmp_path: Path, save_random: Save) -> None:
    write_gguf(llama(tmp_path, save_random, intermediate_size=80), to := tmp_path / "odd.gguf", "q8_0")
    types = stored_types(to)
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_the_shape_is_told(tmp_path: Path) -> None:
    write_gguf(TINY, to := tmp_path / "my-tiny.gguf", "bf16")
    settings = settings_in(to)
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "my-tiny",
        "general.file_type": 32,
        "llama.context_length": 512,
        "llama.embedding_length": 128,
        "llama.block_count": 8,
        "llama.feed_forward_length": 384,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 1536,
    }
    assert {name: settings.get(name) for name in expected} == expected
    assert settings["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(tmp_path: Path) -> None:
    write_gguf(
        changed_config(TINY, tmp_path / "window", sliding_window=128), to := tmp_path / "window.gguf", "f16"
    )
    assert settings_in(to)["llama.context_length"] == 128


@pytest.mark.parametrize("same", [False, True])
def test_a_head_that_config_json_calls_tied_is_written_where_the_checkpoint_stores_another(
    tmp_path: Path, save_random: Save, same: bool
) -> None:
    folder = llama(tmp_path, save_random)
    weights = load_file(folder / "model.safetensors")
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    folder = changed_config(folder, tmp_path / "tied", tie_word_embeddings=True)
    write_gguf(folder, to := tmp_path / "tied.gguf", "f16")
    stored = read_back(to)
    assert ("output.weight" in stored) is not same, "without one, llama.cpp takes the embeddings"
    if not same:
        assert np.array_equal(stored["output.weight"], weights["lm_head.weight"].half().float().numpy())
    measured: Any = load_model(
        ModelSettings(name=str(folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )
    head = stored["token_embd.weight" if same else "output.weight"]
    assert np.array_equal(head, measured.lm_head.weight.detach().half().float().numpy())


def test_scales_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "scaled")
    weights = load_file(folder / "model.safetensors") | {
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        write_gguf(folder, tmp_path / "scaled.gguf", "f16")
    assert plain(caught.value, model=folder) == snapshot(
        "The checkpoint <model> holds model.layers.0.mlp.down_proj.weight_scale, which the model that its "
        "config.json describes does not have.\n"
        "It is quantised already, or its config.json is another model's. Give the original checkpoint."
    )
    assert not (tmp_path / "scaled.gguf").exists()


def test_biases_and_a_head_of_its_own_are_written(tmp_path: Path, save_random: Save) -> None:
    folder = llama(tmp_path, save_random, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    weights = {
        name: torch.randn_like(weight) for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_gguf(folder, to := tmp_path / "biased.gguf", "f16")
    stored = read_back(to)
    assert {source_of(name) for name in stored} == set(weights)
    assert stored_types(to)["blk.1.attn_k.bias"] == "F32"
    key = in_the_checkpoints_order("blk.1.attn_k.bias", stored["blk.1.attn_k.bias"], heads=2)
    assert np.array_equal(key, weights["model.layers.1.self_attn.k_proj.bias"].numpy())


def test_scaled_positions_are_told_as_factors_of_the_frequencies(tmp_path: Path, save_random: Save) -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write_gguf(
        llama(tmp_path, save_random, rope_parameters={"rope_type": "llama3", "rope_theta": 1e6, **llama3}),
        to := tmp_path / "l.gguf",
        "f16",
    )
    factors = read_back(to)["rope_freqs.weight"]
    assert (factors[0], factors[-1]) == (1.0, pytest.approx(8.0)), (
        "fast turns stay, slow ones are slowed by the factor"
    )
    assert (np.diff(factors) >= 0).all()


def test_yarn_also_scales_queries_and_keys(tmp_path: Path, save_random: Save) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    write_gguf(llama(tmp_path, save_random, rope_parameters=rope), to := tmp_path / "yarn.gguf", "f16")
    assert settings_in(to)["llama.rope.scaling.attn_factor"] == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_a_change_is_stored_in_the_place_of_a_weight(tmp_path: Path, small_model_folder: Path) -> None:
    seen: dict[str, torch.dtype] = {}

    def change(name: str, weight: Tensor) -> Tensor:
        seen[name] = weight.dtype
        return weight + 1.0 if name == "model.layers.2.self_attn.k_proj.weight" else weight

    write_gguf(small_model_folder, same := tmp_path / "same.gguf", "f16")
    write_gguf(small_model_folder, changed := tmp_path / "changed.gguf", "f16", change)
    checkpoint = load_file(small_model_folder / "model.safetensors")
    before, after = read_back(same), read_back(changed)
    assert seen == dict.fromkeys(checkpoint, torch.float32)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == [
        "blk.2.attn_k.weight"
    ]
    expected = (
        (checkpoint["model.layers.2.self_attn.k_proj.weight"].float() + 1.0).to(torch.float16).float().numpy()
    )
    assert np.array_equal(
        in_the_checkpoints_order("blk.2.attn_k.weight", after["blk.2.attn_k.weight"], heads=2), expected
    )


def test_a_sharded_checkpoint_gives_the_same_bytes(tmp_path: Path, small_model_folder: Path) -> None:
    sharded = tmp_path / "sharded"
    model = load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )
    shutil.copytree(small_model_folder, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    write_gguf(small_model_folder, to := tmp_path / "model.gguf", "q8_0")
    one = to.read_bytes()
    write_gguf(sharded, to, "q8_0")
    assert to.read_bytes() == one


def test_an_interrupted_file_leaves_nothing_and_the_old_one_in_its_place(
    tmp_path: Path, small_model_folder: Path
) -> None:
    def interrupt(name: str, weight: Tensor) -> Tensor:
        raise KeyboardInterrupt

    to = tmp_path / "model.gguf"
    to.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_gguf(small_model_folder, to, "f16", interrupt)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.gguf", b"old")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            snapshot(
                "<model> has rotary positions of type dynamic, which no GGUF file can say.\n"
                "Export it merged instead."
            ),
        ),
        (
            {"hidden_act": "gelu"},
            snapshot("<model> computes gelu where llama.cpp computes silu.\nExport it merged instead."),
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = changed_config(TINY, tmp_path / "other", **changes)
    with pytest.raises(UserError) as caught:
        write_gguf(model, tmp_path / "other.gguf", "f16")
    assert plain(caught.value, model=model) == message


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, small_mixtral_folder: Path) -> None:
    with pytest.raises(UserError) as told:
        write_gguf(small_mixtral_folder, tmp_path / "mixtral.gguf", "f16")
    assert plain(told.value, model=small_mixtral_folder) == snapshot(
        "<model> is a MixtralForCausalLM: GGUF files are written of LlamaForCausalLM and MistralForCausalLM "
        "only.\n"
        "Export it merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = changed_config(TINY, tmp_path / "lacking", num_hidden_layers=9)
    with pytest.raises(UserError) as caught:
        write_gguf(folder, tmp_path / "lacking.gguf", "f16")
    assert plain(caught.value, model=folder) == snapshot(
        "The checkpoint <model> lacks 9 weights, model.layers.8.input_layernorm.weight among them.\n"
        "Download or copy it again."
    )
    assert not (tmp_path / "lacking.gguf").exists()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = changed_config(TINY, tmp_path / "other", intermediate_size=320)
    with pytest.raises(UserError) as caught:
        write_gguf(folder, tmp_path / "other.gguf", "f16")
    assert plain(caught.value, model=folder) == snapshot(
        "model.layers.0.mlp.gate_proj.weight has the shape (384, 128), but config.json makes it (320, 128): "
        "they are of two models."
    )


def test_too_little_disk_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    folder = changed_config(
        TINY, tmp_path / "huge", num_hidden_layers=64, hidden_size=2**16, intermediate_size=2**20
    )
    with pytest.raises(UserError) as told:
        write_gguf(folder, tmp_path / "huge.gguf", "q8_0")
    needed, free = (words.split()[-1] for words in str(told.value).split(" GB")[:2])
    assert float(needed) == pytest.approx(13_200 * 34 / 32, rel=0.2)
    changing = {"file": tmp_path / "huge.gguf", "needed": f"{needed} GB", "free": f"{free} GB"}
    assert plain(told.value, **changing) == snapshot(
        "<file> takes <needed>, but <free> are free there.\n"
        "Make room, or choose another folder or a smaller kind: q8_0 takes half of f16, q4_0 about a quarter."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def rmu_of(**changes: Any) -> Rmu:
    return Rmu(
        **{
            "target_layer": 3,
            "adapter_layers": [1, 3],
            "modules": ["down_proj", "q_proj", "k_proj"],
            "rank": 4,
            "lora_alpha": 6,
        }
        | changes
    )


def random_adapter(folder: Path, settings: ModelSettings, rmu: Rmu) -> Path:
    model = add_adapter(load_model(settings, torch.device("cpu")), rmu, settings)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, folder)
    return folder


def changed_adapter(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_an_adapter_alone_is_the_same_update(tmp_path: Path, small_settings: ModelSettings) -> None:
    adapter = random_adapter(tmp_path / "adapter", small_settings, rmu_of())
    write_gguf_adapter(adapter, Path(small_settings.name), to := tmp_path / "adapter.gguf")
    settings, stored = settings_in(to), read_back(to)
    assert {
        name: settings[name]
        for name in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    } == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    parts = ("attn_q", "attn_k", "ffn_down")
    assert set(stored) == {
        f"blk.{layer}.{part}.weight.lora_{side}" for layer, part, side in product((1, 3), parts, "ab")
    }
    trained = load_file(adapter / "adapter_model.safetensors")
    for layer, part in product((1, 3), parts):
        name = f"blk.{layer}.{part}.weight"
        source = f"base_model.model.{source_of(name).removesuffix('.weight')}"
        expected = trained[f"{source}.lora_B.weight"] @ trained[f"{source}.lora_A.weight"]
        update = stored[f"{name}.lora_b"] @ stored[f"{name}.lora_a"]
        heads = {"attn_q": 4, "attn_k": 2}.get(part, 1)
        assert np.allclose(in_the_checkpoints_order(name, update, heads), expected.numpy(), atol=1e-5), name


def test_an_adapter_of_whole_matrices_is_refused(tmp_path: Path, small_settings: ModelSettings) -> None:
    adapter = random_adapter(tmp_path / "adapter", small_settings, rmu_of(trainable="weights"))
    with pytest.raises(UserError) as caught:
        write_gguf_adapter(adapter, Path(small_settings.name), tmp_path / "adapter.gguf")
    assert plain(caught.value, adapter=adapter) == snapshot(
        "The adapter <adapter> holds whole matrices, which a GGUF adapter cannot.\n"
        "Export the merged model as GGUF instead."
    )


def test_an_adapter_that_scales_in_its_own_way_is_refused(
    tmp_path: Path, small_settings: ModelSettings
) -> None:
    adapter = changed_adapter(
        random_adapter(tmp_path / "adapter", small_settings, rmu_of()),
        use_rslora=True,
        alpha_pattern={"q_proj": 2},
    )
    with pytest.raises(UserError) as caught:
        write_gguf_adapter(adapter, Path(small_settings.name), tmp_path / "adapter.gguf")
    assert plain(caught.value, adapter=adapter) == snapshot(
        "The adapter <adapter> uses use_rslora, alpha_pattern, which a GGUF adapter cannot say.\n"
        "Export the merged model as GGUF instead."
    )


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, small_settings: ModelSettings) -> None:
    adapter = random_adapter(tmp_path / "adapter", small_settings, rmu_of())
    with pytest.raises(UserError) as caught:
        write_gguf_adapter(adapter, TINY, tmp_path / "adapter.gguf")
    assert plain(caught.value, adapter=adapter, model=TINY) == snapshot(
        "The adapter <adapter> changes model.layers.1.mlp.down_proj.weight of (64, 128), which <model> has "
        "not.\n"
        "Give its own base model."
    )
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_gguf_adapter(tmp_path, TINY, tmp_path / "adapter.gguf")
    assert plain(caught.value, folder=tmp_path) == snapshot(
        "<folder> holds no adapter.\nRun the unlearn stage first."
    )
