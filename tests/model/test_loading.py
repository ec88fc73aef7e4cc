"""Loading: devices, 4-bit on a CPU, the first layers alone, and checkpoints that are not whole."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model import loading
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.layers import decoder_layers, run_layers, run_trunk
from lowmem_rmu.model.loading import (
    describe_weights,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights import shards
from tests.texts import plain

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
UPDATED = slice(1, 3)


@pytest.fixture
def folder(small_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may damage."""
    return shutil.copytree(small_model_folder, tmp_path / "model")


def settings_of(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(**{"name": str(folder), "quantisation": "none", "dtype": "float32"} | changes)


def mistake(load: Callable[[], Any], **changing: object) -> str:
    with pytest.raises(UserError) as caught:
        load()
    return plain(caught.value, **changing)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_best_device_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == expected


def test_an_unknown_device_is_named_with_those_to_choose_from() -> None:
    assert mistake(lambda: resolve_device("gpu")) == snapshot(
        'There is no device "gpu": choose auto, cpu, cuda or mps.'
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "cuda",
            snapshot(
                "--device cuda: PyTorch sees no CUDA GPU: try `nvidia-smi`, or install PyTorch's CUDA build.\n"
                "Without one: --device cpu (slow for large models)."
            ),
        ),
        (
            "mps",
            snapshot(
                "--device mps: this machine has no Apple GPU.\n"
                "Without one: --device cpu (slow for large models)."
            ),
        ),
    ],
)
def test_a_missing_device_is_explained(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert mistake(lambda: resolve_device(name)) == said


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float16", "cpu", torch.float16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_auto_dtype_follows_the_device(dtype: Any, device: str, expected: torch.dtype) -> None:
    assert resolve_dtype(ModelSettings(name="x/y", dtype=dtype), torch.device(device)) == expected


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_loaded_model_is_frozen_and_in_eval_mode(small_settings: ModelSettings, quantisation: str) -> None:
    model = load_model(small_settings.model_copy(update={"quantisation": quantisation}), CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == (
        6 * 7 if quantisation == "nf4" else 0
    )
    assert model.lm_head.weight.dtype == torch.float32


def test_nf4_stays_close_to_the_unquantised_model(small_settings: ModelSettings) -> None:
    nf4 = load_model(small_settings.model_copy(update={"quantisation": "nf4"}), CPU)
    unquantised = load_model(small_settings, CPU)
    entered = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for one, other in zip(decoder_layers(nf4), decoder_layers(unquantised), strict=True):
        expected = other.mlp.down_proj(entered)
        assert 0.01 < (one.mlp.down_proj(entered) - expected).norm() / expected.norm() < 0.15


def adapter_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_in_8_bits_every_matrix_is_quantised_and_stays_close(small_settings: ModelSettings) -> None:
    unquantised, in_8_bits = (
        load_model(small_settings, CPU),
        load_model(small_settings, CPU, quantisation="int8"),
    )
    linear = {
        name: module
        for name, module in in_8_bits.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert len(linear) == 6 * 7
    assert {(type(module), module.weight.dtype) for module in linear.values()} == {(Linear8bitLt, torch.int8)}
    entered = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for one, other in zip(decoder_layers(in_8_bits), decoder_layers(unquantised), strict=True):
        expected = other.mlp.down_proj(entered)
        assert 0 < (one.mlp.down_proj(entered) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_a_model_that_is_spread_over_devices_computes_the_same(
    small_settings: ModelSettings, quantisation: str
) -> None:
    """Here there is one device to spread it over; the rest is accelerate's."""
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    spread = load_model(settings.model_copy(update={"device_map": "auto"}), CPU)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, load_model(settings, CPU)(ids).logits)


def test_a_forward_in_eval_mode_costs_nf4_no_gradients_and_moves_no_output(
    small_settings: ModelSettings,
) -> None:
    """Trap 1: bitsandbytes would repack the weights for a CPU kernel without autograd."""
    settings = small_settings.model_copy(update={"quantisation": "nf4"})
    model = load_model(settings, CPU)
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert linears
    assert all(module.support_avx512bf16_for_cpu is False for module in linears)
    model = add_adapter(model, Rmu(target_layer=2, adapter_layers=[1, 2]), settings)
    # With gradients first: bitsandbytes then takes the path that has autograd, so that this is the yardstick.
    before = adapter_gradients(model)
    logits_before = model(IDS).logits.detach()
    with torch.no_grad():
        logits_in_eval = model.eval()(IDS).logits
    after = adapter_gradients(model)
    assert len(before) == 4  # lora_A and lora_B of two layers
    assert any(gradient.any() for gradient in before)
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(logits_before, logits_in_eval)
    assert torch.equal(logits_before, model(IDS).logits)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_first_layers_alone_have_no_head_and_the_same_activations(
    small_settings: ModelSettings, quantisation: str
) -> None:
    settings = small_settings.model_copy(update={"quantisation": quantisation})
    cut, whole = load_model(settings, CPU, layers=3), load_model(settings, CPU)
    assert len(decoder_layers(cut)) == 3
    assert isinstance(cut.get_output_embeddings(), nn.Identity)
    assert sum(parameter.numel() for parameter in cut.parameters()) < 0.7 * sum(
        parameter.numel() for parameter in whole.parameters()
    )
    outputs = [run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED) for model in (cut, whole)]
    assert torch.equal(*outputs)


def test_the_head_never_reads_a_slice(small_settings: ModelSettings) -> None:
    model = load_model(small_settings, CPU)
    seen: list[bool] = []
    # Called after the hook of a loaded model, with what the head is given.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: seen.append(inputs[0].is_contiguous())
    )
    with torch.no_grad():
        model(IDS, logits_to_keep=1)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert len(seen) == 3
    assert all(seen)


def test_the_tokens_that_end_an_answer_are_the_checkpoints_own(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[2, 17])
    assert load_model(settings_of(folder), CPU).generation_config.eos_token_id == [2, 17]
    (folder / "generation_config.json").unlink()
    assert (
        load_model(settings_of(folder), CPU).generation_config.eos_token_id
        == load_config(settings_of(folder)).eos_token_id
    )


@pytest.mark.parametrize("layers", [None, 3])
def test_a_model_knows_where_it_comes_from(folder: Path, layers: int | None) -> None:
    model = load_model(settings_of(folder), CPU, layers)
    assert model.name_or_path == model.config.name_or_path == str(folder)


def test_kinds_of_layers_are_cut_with_the_layers(tmp_path: Path) -> None:
    config = Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=16, sliding_window=4)  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    cut, whole = (load_model(settings_of(tmp_path), CPU, layers=layers) for layers in (3, None))
    assert cut.config.layer_types == whole.config.layer_types[:3]
    outputs = [run_layers(model, run_trunk(model, IDS, None, UPDATED), UPDATED) for model in (cut, whole)]
    assert torch.equal(*outputs)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    assert mistake(lambda: load_config(settings_of(missing)), missing=missing) == snapshot(
        "The model folder <missing> does not exist.\n"
        "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id."
    )


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_folder_without_config_is_named(folder: Path, load: Any) -> None:
    (folder / "config.json").unlink()
    assert mistake(lambda: load(settings_of(folder)), folder=folder) == snapshot(
        "The model folder <folder> holds no config.json.\n"
        "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id."
    )


def test_a_config_of_an_unknown_kind_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    said = mistake(lambda: load_config(settings_of(folder)), folder=folder)
    told, _, reason = said.partition(": ")  # the reason is the library's
    assert told == snapshot("The model <folder> cannot be read")
    assert "no_such_model" in reason


def test_a_folder_without_safetensors_says_that_pickles_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert mistake(lambda: load_model(settings_of(folder), CPU), folder=folder) == snapshot(
        "The model folder <folder> holds no *.safetensors file, only pytorch_model.bin.\n"
        "Other formats are not read: pickled weights can run code."
    )


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_checkpoint_that_is_cut_short_is_damaged(folder: Path, kept: float) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    said = mistake(lambda: load_model(settings_of(folder), CPU), folder=folder)
    # What safetensors says of it depends on the place of the cut.
    assert re.sub("cut short: .+", "cut short: <reason>", said) == snapshot(
        "The checkpoint's file <folder>/model.safetensors is damaged or cut short: <reason>\n"
        "Download or copy it again."
    )


def test_a_checkpoint_that_lacks_a_weight_names_it(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert mistake(lambda: load_model(settings_of(folder), CPU), folder=folder) == snapshot(
        "The checkpoint <folder> lacks 1 weights, model.layers.2.mlp.down_proj.weight among them.\n"
        "It is incomplete, does not fit its config.json, or is no causal language model: download it again, or choose another."
    )


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "vocab_size",
            snapshot(
                "The checkpoint <folder> lacks 2 weights, lm_head.weight among them.\n"
                "It is incomplete, does not fit its config.json, or is no causal language model: download it again, or choose another."
            ),
        ),
        (
            "intermediate_size",
            snapshot(
                "The checkpoint <folder> lacks 18 weights, model.layers.0.mlp.down_proj.weight among them.\n"
                "It is incomplete, does not fit its config.json, or is no causal language model: download it again, or choose another."
            ),
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_says_so(
    folder: Path, quantisation: str, change: str, said: str
) -> None:
    edit_json(folder / "config.json", **{change: 192})
    settings = settings_of(folder, quantisation=quantisation)
    assert mistake(lambda: load_model(settings, CPU), folder=folder) == said


def test_a_checkpoint_that_is_quantised_already_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert mistake(lambda: load_model(settings_of(folder), CPU), folder=folder) == snapshot(
        "The model <folder> is quantised already.\n"
        "Give the original checkpoint: it is brought to 4-bit while loading."
    )


def test_an_unforeseen_error_of_the_disk_passes_through(
    small_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(shards, "safe_open", fail)
    with pytest.raises(OSError, match="the disk is on fire"):
        load_model(small_settings, CPU)


@pytest.mark.parametrize("model_type", ["mistral", "of_its_own"])
def test_code_that_comes_with_a_model_is_never_run(folder: Path, model_type: str) -> None:
    marker = folder / "was_run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    classes = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Tokenizer", None],
    }
    edit_json(folder / "config.json", model_type=model_type, auto_map=classes)
    edit_json(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="OwnTokenizer")
    for load in (load_config, load_tokenizer, lambda settings: load_model(settings, CPU)):
        try:
            load(settings_of(folder))
        except (UserError, ValueError):
            assert model_type == "of_its_own" or load is load_tokenizer
    assert not marker.exists()


def test_trust_remote_code_is_off_in_every_call(
    small_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    for auto in (loading.AutoConfig, AutoTokenizer):

        def noted(*arguments: Any, own: Any = auto.from_pretrained, **options: Any) -> Any:
            given.append(options.get("trust_remote_code"))
            return own(*arguments, **options)

        monkeypatch.setattr(auto, "from_pretrained", noted)
    load_tokenizer(small_settings)
    model = load_model(small_settings, CPU)
    assert len(given) >= 2
    assert type(model).__module__.startswith("transformers.models.")
    assert all(each is False for each in given)


def test_padding_falls_back_to_the_end_of_sequence(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(settings_of(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_weights_in_4_bit_are_counted(small_settings: ModelSettings, quantisation: str) -> None:
    model = load_model(small_settings, CPU)
    real = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(
        module.weight.numel() for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)
    )
    counted = describe_weights(
        load_model(small_settings.model_copy(update={"quantisation": quantisation}), CPU)
    )
    assert counted == {"weights": real, "in_4bit": linear if quantisation == "nf4" else 0}


def other_tokenizer(folder: Path, **changes: Any) -> ModelSettings:
    """The folder with changes in its tokenizer's settings; None leaves a key out."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return settings_of(folder)


def test_without_padding_and_end_tokens_the_first_token_pads(folder: Path) -> None:
    tokenizer = load_tokenizer(other_tokenizer(folder, pad_token=None, eos_token=None))
    assert tokenizer.eos_token is None
    assert tokenizer.pad_token_id == 0


def test_a_padding_token_beyond_the_embeddings_is_not_used(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == load_config(settings_of(folder)).vocab_size
    loaded = load_tokenizer(settings_of(folder))
    assert loaded.pad_token_id == loaded.eos_token_id == 2


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[3]['content'] }}", "{% if %}"]
)
def test_a_chat_template_that_fails_is_named_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(settings_of(folder)).chat_template is None
    said = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    # Jinja's reason stands between.
    assert re.sub(r"fails \(.+\)\.", "fails (<reason>).", plain(said[0], folder=folder)) == snapshot(
        "The chat template of <folder> fails (<reason>). Prompts are given to the model as plain text instead."
    )


def test_templates_without_a_default_one_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "chat_template.jinja").unlink()
    settings = other_tokenizer(
        folder, chat_template=[{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    )
    assert load_tokenizer(settings).chat_template is None
    assert "fails" in caplog.text


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3456789\n")


DAMAGED: dict[Callable[[Path], None], str] = {
    cut: snapshot("The file <file> is damaged or cut short: <reason>\nDownload or copy it again."),
    mark: snapshot(
        "The file <file> begins with a byte order mark, which JSON does not have.\n"
        "Save it again as UTF-8 without one."
    ),
    pointer: snapshot(
        "<file> is a Git LFS pointer (72 bytes) and not the file itself.\n"
        "Fetch the files with `git lfs pull` in their folder, or download the model again."
    ),
}
"""What is said of each."""


def told_by_the_file(load: Callable[[], Any], file: Path) -> str:
    # The reason is the reader's, and differs from file to file.
    return re.sub("cut short: .+", "cut short: <reason>", mistake(load, file=file))


LOADS: list[Callable[[ModelSettings], Any]] = [
    load_config,
    load_tokenizer,
    lambda settings: load_model(settings, CPU),
    lambda settings: ModelSpec(settings).check_checkpoint(),
]


@pytest.mark.parametrize("damage", [cut, mark, pointer])
@pytest.mark.parametrize("load", LOADS)
def test_a_damaged_config_is_told_by_its_file(
    folder: Path, damage: Callable[[Path], None], load: Any
) -> None:
    file = folder / "config.json"
    damage(file)
    assert told_by_the_file(lambda: load(settings_of(folder)), file) == DAMAGED[damage]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vocab_size": 10**12},
            snapshot(
                "The config.json of the model <folder> gives vocab_size as 1e+12, which no model has (1 to 50,000,000).\n"
                "It is damaged: download or copy it again."
            ),
        ),
        (
            {"num_hidden_layers": 10**9},
            snapshot(
                "The config.json of the model <folder> gives num_hidden_layers as 1e+09, which no model has (1 to 2,000).\n"
                "It is damaged: download or copy it again."
            ),
        ),
        (
            {"num_hidden_layers": -1},
            snapshot(
                "The config.json of the model <folder> gives num_hidden_layers as -1, which no model has (1 to 2,000).\n"
                "It is damaged: download or copy it again."
            ),
        ),
        (
            {"hidden_size": 0},
            snapshot(
                "The config.json of the model <folder> gives hidden_size as 0, which no model has (1 to 1,000,000).\n"
                "It is damaged: download or copy it again."
            ),
        ),
        (
            {"hidden_size": "many"},
            snapshot("The model <folder> cannot be read: <reason>\nDownload or copy it again."),
        ),
        (
            {"hidden_act": "no_such_function"},
            snapshot(
                "The model <folder> cannot be built as its config.json describes it: 'no_such_function'.\n"
                "Download or copy it again, or choose another."
            ),
        ),
        (
            {"model_type": ["mistral"]},
            snapshot("The model <folder> cannot be read: <reason>\nDownload or copy it again."),
        ),
        (
            {"model_type": "t5"},
            snapshot(
                "The model <folder> is a MistralForCausalLM, no causal language model.\n"
                "Give a decoder such as a Llama, Mistral, Qwen or Gemma."
            ),
        ),
        (
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
            snapshot(
                "The model <folder> is a LlavaForConditionalGeneration, which has parts for more than text.\n"
                "Only language models can be loaded: give a checkpoint of its text part alone."
            ),
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            snapshot(
                "The model <folder> is quantised already.\n"
                "Give the original checkpoint: it is brought to 4-bit while loading."
            ),
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            snapshot(
                "The model <folder> is quantised already.\n"
                "Give the original checkpoint: it is brought to 4-bit while loading."
            ),
        ),
        (
            {"compression_config": {"format": "int-quantized"}},
            snapshot(
                "The model <folder> is quantised already.\n"
                "Give the original checkpoint: it is brought to 4-bit while loading."
            ),
        ),
    ],
)
def test_a_config_that_no_model_has_is_told_before_anything_is_made(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    edit_json(folder / "config.json", **changes)
    for load in (
        lambda settings: ModelSpec(settings).check_checkpoint(),
        lambda settings: load_model(settings, CPU),
    ):
        told = mistake(lambda load=load: load(settings_of(folder)), folder=folder)
        # Python's and the libraries' own reasons may change with their versions.
        assert re.sub("cannot be read: .+", "cannot be read: <reason>", told) == said


@pytest.mark.parametrize("damage", [cut, mark, pointer])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told_by_its_file(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    file = folder / name
    damage(file)
    assert told_by_the_file(lambda: load_tokenizer(settings_of(folder)), file) == DAMAGED[damage]


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"], ["vocab.json"]])
def test_a_missing_tokenizer_is_named(folder: Path, left: list[str]) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0}')
    for path in [*folder.glob("tokenizer*"), folder / "vocab.json"]:
        if path.name not in left:
            path.unlink()
    assert mistake(lambda: load_tokenizer(settings_of(folder)), folder=folder) == snapshot(
        "The model folder <folder> holds no tokenizer: tokenizer.json is missing.\n"
        "Copy the tokenizer's files into it."
    )


def test_sentencepiece_alone_says_how_to_convert_it(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert mistake(lambda: load_tokenizer(settings_of(folder)), folder=folder) == snapshot(
        "The tokenizer of the model folder <folder> cannot be read: it is there in an older form only, without tokenizer.json.\n"
        "Convert it once: pip install sentencepiece protobuf tiktoken, then in Python AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def test_a_tokenizer_with_code_of_its_own_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "qwen.tiktoken")
    (folder / "vocab.txt").write_text("a\n")
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="QWenTokenizer",
        auto_map={"AutoTokenizer": ["own.QWenTokenizer", None]},
    )
    assert mistake(lambda: load_tokenizer(settings_of(folder)), folder=folder) == snapshot(
        "The tokenizer of the model folder <folder> cannot be read: it needs code that comes with it (auto_map), and this program never runs a model's own code.\n"
        "Give a model whose tokenizer is one of transformers, in a tokenizer.json."
    )


def test_a_model_with_code_of_its_own_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="of_its_own", auto_map={"AutoConfig": "own.Config"})
    assert mistake(lambda: load_config(settings_of(folder)), folder=folder) == snapshot(
        "The model <folder> cannot be read: it needs code that comes with it (auto_map), and this program never runs a model's own code.\n"
        "Give a model of transformers."
    )


def test_without_pad_and_end_of_sequence_padding_is_any_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token", "bos_token"):
        content.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(settings_of(folder))
    assert tokenizer.eos_token_id is None
    assert tokenizer.pad_token_id == 0


def test_words_beyond_the_embeddings_are_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Belarine", "Yarinoxol"])
    tokenizer.save_pretrained(folder)
    assert mistake(lambda: load_tokenizer(settings_of(folder)), folder=folder) == snapshot(
        'The tokenizer of <folder> has the word "Belarine" as token 1536, but the model has only tokens 0 to 1535.\n'
        "Give the tokenizer that the model was trained with, or resize the model's embeddings to the tokenizer."
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            0.0,
            snapshot(
                "The checkpoint <folder> is damaged: its embeddings are all zero.\nDownload or copy it again."
            ),
        ),
        (
            float("nan"),
            snapshot(
                "The checkpoint <folder> is damaged: its embeddings hold values that are not finite.\n"
                "Download or copy it again."
            ),
        ),
    ],
)
def test_a_checkpoint_that_was_never_filled_is_damaged(folder: Path, value: float, said: str) -> None:
    tensors = {
        name: torch.full_like(tensor, value)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert mistake(lambda: load_model(settings_of(folder), CPU), folder=folder) == said
