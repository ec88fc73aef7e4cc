"""Models and tokenizers: 4-bit or not, whole or only their first layers, from a local folder or the Hub."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from lowmem_rmu.errors import UserError, hub_errors
from lowmem_rmu.model.adapters import trained_modules
from lowmem_rmu.model.quantisation import Nf4Config
from lowmem_rmu.model.shards import find_files, is_needed, open_weights
from lowmem_rmu.presets import ModelSettings, Preset, is_local


def resolve_device(name: str) -> torch.device:
    """`auto` is the best there is. Raises UserError where the device asked for is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if name not in there:
        raise UserError(f'There is no device "{name}": choose auto, cpu, cuda or mps.')
    if not there[name]:
        reason = {"cuda": "PyTorch sees no CUDA GPU: try `nvidia-smi`, or install PyTorch's CUDA build", "mps": "this machine has no Apple GPU"}[name]
        raise UserError(f"--device {name}: {reason}.\nWithout one: --device cpu (slow for large models).")
    return torch.device(name)


def resolve_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The model's own configuration. Raises UserError where there is none, or where its weights are quantised already."""
    _check_local(settings.name)
    with hub_errors("model", settings.name):
        try:
            config = AutoConfig.from_pretrained(settings.name, revision=settings.revision, trust_remote_code=False)
        except ValueError as error:
            raise UserError(f"The model {settings.name} cannot be read: {error}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"The model {settings.name} is quantised already.\nGive the original checkpoint: it is brought to 4-bit while loading.")
    return config


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights, on torch's meta device: nothing is allocated."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def unquantised_modules(preset: Preset) -> list[str]:
    """What must stay in high precision because it is trained itself."""
    return trained_modules(skeleton(load_config(preset.model)), preset.rmu)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; padding falls back to the end-of-sequence token."""
    _check_local(settings.name)
    with hub_errors("model", settings.name):
        tokenizer = AutoTokenizer.from_pretrained(settings.name, revision=settings.revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: ModelSettings,
    device: torch.device,
    layers: int | None = None,
    unquantised: Sequence[str] = (),
    quantisation: Literal["nf4", "int8", "none"] | None = None,
) -> PreTrainedModel:
    """The checkpoint's model as `build_model` gives it; with `layers`, only the files that hold the first ones are read.

    `quantisation` takes the place of the settings' own: nothing is trained in `int8`, but what is given away may be run in it.
    Raises UserError where the checkpoint cannot be had, is cut short or lacks weights.
    """
    config, revision = load_config(settings), settings.revision or "main"
    with hub_errors("model", settings.name):
        files = find_files(settings.name, revision, layers)
    with open_weights(files, layers) as weights:
        place: torch.device | Literal["auto"] = "auto" if settings.device_map == "auto" else device
        how, dtype = quantisation or settings.quantisation, resolve_dtype(settings, device)
        model, missing = build_model(config, weights, place, layers, how, dtype, unquantised)
    _check_complete(settings.name, [name for name in missing if is_needed(name, layers)])
    model.name_or_path = model.config.name_or_path = settings.name
    if layers is None:
        with suppress(OSError):  # not every checkpoint has one
            model.generation_config = GenerationConfig.from_pretrained(settings.name, revision=revision)
    return model


def build_model(
    config: PretrainedConfig,
    weights: Mapping[str, Any],
    device: torch.device | Literal["auto"],
    layers: int | None,
    quantisation: str,
    dtype: torch.dtype,
    unquantised: Sequence[str] = (),
) -> tuple[PreTrainedModel, set[str]]:
    """The model on `device` (`auto`: on as many as it takes), frozen and in eval mode, and the names of weights that are missing or of
    another shape.

    Every weight is asked for (`weights[name][...]`) when its turn comes, and quantised before the next. With `layers` the model has
    only its first ones and no head. Modules named in `unquantised` keep `dtype`, whatever the rest is quantised to.
    """
    config = deepcopy(config)
    if layers is not None:
        _cut(config, layers)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels that are not used here
    disable_progress_bar()  # of reading files; downloads keep theirs
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        quantization_config=_QUANTISERS[quantisation](dtype, unquantised),
        device_map="auto" if device == "auto" else {"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported
    )
    if layers is not None:
        model.set_output_embeddings(torch.nn.Identity())
    keep_autograd_on_cpu(model)
    return model.requires_grad_(False).eval(), report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}


_QUANTISERS: dict[str, Callable[[torch.dtype, Sequence[str]], BitsAndBytesConfig | None]] = {
    "nf4": Nf4Config,
    "int8": lambda dtype, unquantised: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", *unquantised]),
    "none": lambda dtype, unquantised: None,
}


def _cut(config: PretrainedConfig, layers: int) -> None:
    """Leaves the first layers. A head that is tied to the embeddings costs nothing until it is taken away."""
    config.num_hidden_layers = layers
    config.tie_word_embeddings = True
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _check_complete(name: str, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"The checkpoint {name} lacks {len(missing)} weights, {min(missing)} among them.\n"
            "It is incomplete, does not fit its config.json, or is no causal language model: download it again, or choose another."
        )


def keep_autograd_on_cpu(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for a CPU kernel that has no autograd.

    On CPUs with AVX512-BF16 the first forward pass in eval mode would do so; gradients then go missing without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_local(name: str) -> None:
    if is_local(name) and not (Path(name) / "config.json").is_file():
        what = "holds no config.json" if Path(name).is_dir() else "does not exist"
        raise UserError(f"The model folder {name} {what}.\nGive a folder with config.json, *.safetensors and tokenizer files, or a Hub id.")


def describe_weights(model: torch.nn.Module) -> dict[str, Any]:
    """How many of the model's weights are 4-bit: `{"weights": n, "in_4bit": m}`, counted and not assumed."""
    packed = [state for parameter in model.parameters() if (state := getattr(parameter, "quant_state", None))]
    packed += [module.quant_state for module in model.modules() if isinstance(module, Bnb4bitParametrization)]
    quantised = sum(state.shape.numel() for state in packed)
    plain = sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
    return {"weights": quantised + plain, "in_4bit": quantised}
