"""Adapters as others made or damaged them: one sentence, before a model is loaded; whatever changes layers is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import load_adapter
from lowmem_rmu.model.changes import SavedAdapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.model.logits import logits_at
from lowmem_rmu.model.saved import CONFIG, PICKLED_WEIGHTS, WEIGHTS, adapter_digests, read_adapter_settings
from lowmem_rmu.runs.files import write_json

CPU, IDS = torch.device("cpu"), torch.arange(3, 15)[None]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
IN_LAYERS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "DoRA": LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "IA3": IA3Config(**CAUSAL, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(**CAUSAL, r=4, target_modules=["q_proj", "down_proj"]),
}
ELSEWHERE: dict[str, PeftConfig] = {
    "PROMPT_TUNING": PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "PREFIX_TUNING": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "P_TUNING": PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=8),
    "ADAPTION_PROMPT": AdaptionPromptConfig(**CAUSAL, adapter_layers=2, adapter_len=4),
    "POLY": PolyConfig(**CAUSAL, r=4, n_tasks=2, n_skills=2, n_splits=2, target_modules=["q_proj"]),
    "LORA with alora_invocation_tokens": LoraConfig(
        **CAUSAL, r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]
    ),
}


def make_adapter(config: PeftConfig, model: Path, to: Path) -> tuple[Path, Any]:
    """An adapter with random weights as PEFT saves it, and the model with it."""
    torch.manual_seed(0)
    made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    made.eval().save_pretrained(to)
    return to, made


@pytest.fixture(scope="module")
def made(small_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(IN_LAYERS["DoRA"], small_model_folder, tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A sound adapter to spoil, in the folder of a run that has recorded it."""
    run = tmp_path / "runs/mine"
    shutil.copytree(made, run / "adapter")
    write_json(run / "config.json", {})
    write_json(run / "digests.json", adapter_digests(run / "adapter"))
    return run / "adapter"


def logits(model: Any) -> torch.Tensor:
    """By the way in which questions are scored."""
    with torch.inference_mode():
        return torch.cat(list(logits_at(model, torch.ones_like(IDS, dtype=torch.bool), input_ids=IDS)))


def edited(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    write_json(
        path,
        {
            key: value
            for key, value in (json.loads(path.read_text()) | changes).items()
            if value != "left out"
        },
    )


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_what_changes_layers_is_measured_as_peft_computes_it(
    kind: str, small_settings: ModelSettings, tmp_path: Path
) -> None:
    folder, made = make_adapter(IN_LAYERS[kind], Path(small_settings.name), tmp_path)
    base = load_model(small_settings, CPU)
    before = logits(base)
    after = logits(load_adapter(base, folder))
    with torch.inference_mode():
        torch.testing.assert_close(after, made(IDS).logits[0], atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_acts_outside_of_layers_is_refused(kind: str, small_model_folder: Path, tmp_path: Path) -> None:
    folder, _ = make_adapter(ELSEWHERE[kind], small_model_folder, tmp_path)
    with pytest.raises(
        UserError,
        match=rf"^The adapter {folder} is of the kind {kind}, which acts on the prompt .* no effect\.\nGive an adapter",
    ):
        read_adapter_settings(folder)


def test_a_kind_that_fails_on_4_bit_weights_only_when_used_is_refused_on_loading(
    small_settings: ModelSettings, tmp_path: Path
) -> None:
    folder, _ = make_adapter(
        LoKrConfig(**CAUSAL, r=4, target_modules=["q_proj"]), Path(small_settings.name), tmp_path
    )
    in_4_bit = small_settings.model_copy(update={"quantisation": "nf4"})
    with pytest.raises(UserError, match=r"cannot be put on the model (.|\n)*take --quantisation none"):
        load_adapter(load_model(in_4_bit, CPU), folder)


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).view(-1)[3] = torch.inf
    save_file(tensors, folder / WEIGHTS)
    (folder.parent / "digests.json").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED_WEIGHTS)
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "adapter_model.safetensors is damaged, or was changed: its sha256"),
        (not_finite, "adapter_model.safetensors holds values that are not finite, in "),
        (pickled, "holds its weights pickled only"),
        (lambda folder: (folder / WEIGHTS).unlink(), "lacks its weights, adapter_model.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), "holds no adapter"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "adapter_config.json is damaged"),
        (lambda folder: edited(folder, peft_type="left out"), "it lacks peft_type"),
        (lambda folder: edited(folder, peft_type="SORA"), 'is of the kind "SORA", which PEFT does not know'),
        (lambda folder: edited(folder, peft_type=7), "peft_type should be a valid string"),
        (lambda folder: edited(folder, r=0), "r should be greater than 0"),
        (lambda folder: edited(folder, r="left out"), "it lacks r"),
        (lambda folder: edited(folder, lora_alpha=float("nan")), "lora_alpha should be a finite number"),
        (lambda folder: edited(folder, lora_alpha=77), "adapter_config.json is damaged, or was changed"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "damaged"),
        (lambda folder: (folder.parent / "digests.json").write_text("[1]"), "digests.json is damaged"),
    ],
)
def test_a_spoiled_adapter_is_refused_alike_to_load_and_to_merge(
    folder: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    spoil(folder)
    said = []
    for use in (  # type: ignore[arg-type]
        read_adapter_settings,
        SavedAdapter.open,
        lambda adapter: load_adapter(torch.nn.Module(), adapter),
    ):
        with pytest.raises(UserError) as caught:
            use(folder)
        said.append(str(caught.value))
    assert words in said[0]
    assert len(set(said)) == 1


def test_an_adapter_without_digests_is_read(folder: Path) -> None:
    flip(folder)
    (folder.parent / "digests.json").unlink()
    assert read_adapter_settings(folder)["r"] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: {name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()},
            "size mismatch",
        ),
        (
            lambda tensors: {
                name.replace("layers.0.", "layers.77."): tensor for name, tensor in tensors.items()
            },
            "missing adapter keys",
        ),
        (
            lambda tensors: (
                tensors | {"base_model.model.model.layers.77.mlp.down_proj.lora_A.weight": torch.ones(4, 128)}
            ),
            "the model has no ",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    folder: Path, small_settings: ModelSettings, change: Callable[[Any], Any], words: str
) -> None:
    (folder.parent / "digests.json").unlink()
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(
        UserError,
        match=rf"^The adapter {folder} cannot be put on the model .*{words}(.|\n)*\nGive the model that it was made for",
    ):
        load_adapter(load_model(small_settings, CPU), folder)
