"""Models and tokenizers: 4-bit or not, whole or only their first layers, from a local folder or the Hub."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
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

from lowmem_rmu.config.depth import DEPTH_KEYS
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.quantization import READ_DIRECTLY, Nf4Config
from lowmem_rmu.weights.contents import check_contents, tied_otherwise
from lowmem_rmu.weights.shards import is_needed, open_weights
from lowmem_rmu.weights.source import COPY_AGAIN, Source, locate, read_json
from lowmem_rmu.weights.stored import StoredTensor, checkpoint_tensors

LOGGER = logging.getLogger(__name__)
Quantisation = Literal["nf4", "int8", "none"]
"""`nf4` and `none` as in `ModelSettings`. Nothing is trained in `int8`, but exported models may be run in
it.
"""
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where `config.json` says that the weights are quantized: transformers, old compressed-tensors, MLX."""
MOST = dict.fromkeys(DEPTH_KEYS, 2_000) | {
    "vocab_size": 50_000_000,
    "hidden_size": 1_000_000,
    "n_embd": 1_000_000,
    "d_model": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "n_head": 100_000,
    "num_key_value_heads": 100_000,
    "num_local_experts": 100_000,
    "num_experts": 100_000,
    "n_routed_experts": 100_000,
}
"""Sizes in `config.json`, and the largest that is taken for one: far beyond any model."""
CUSTOM_CODE = "it needs code that comes with it (auto_map), and this program never runs a model's own code"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def resolve_device(name: str) -> torch.device:
    """`auto` is the best there is. Raises UserError where the device asked for is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if name not in there:
        raise UserError(f'There is no device "{name}": choose auto, cpu, cuda or mps.')
    if not there[name]:
        reason = {
            "cuda": "PyTorch sees no CUDA GPU: try `nvidia-smi`, or install PyTorch's CUDA build",
            "mps": "this machine has no Apple GPU",
        }[name]
        raise UserError(
            f"--device {name}: {reason}.",
            "Without one: --device cpu (slow for large models).",
        )
    return torch.device(name)


def resolve_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """Return the model's own configuration.

    Raises UserError where there is none, where it is damaged or of a model that this program cannot run, and
    where the weights are quantised already.
    """
    source = locate(settings.name, settings.revision)
    content = source.read_config()
    if "model_type" not in content and "auto_map" not in content:
        raise UserError(
            f"The config.json of the {source.words} names no model_type.",
            "Give a folder with a transformers model, or a Hub id.",
        )
    if says_quantized(content):
        raise UserError(
            f"The model {settings.name} is quantised already.",
            "Give the original checkpoint: it is brought to 4-bit while loading.",
        )
    check_sizes(settings.name, content)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # each model's configuration checks its own values, and raises what it likes
        if "auto_map" in content and "trust_remote_code" in str(error):
            raise UserError(
                f"The model {settings.name} cannot be read: {CUSTOM_CODE}.",
                "Give a model of transformers.",
            ) from error
        raise UserError(
            f"The model {settings.name} cannot be read: {_reason(error)}.",
            f"{COPY_AGAIN}",
        ) from error
    config.name_or_path = settings.name
    check_supported(settings.name, config)
    check_quantisable(config, settings.quantisation)
    return config


def config_of_preset(settings: ModelSettings) -> PretrainedConfig:
    """Return the shape that a preset gives of its model (`model.config`). Raises UserError where it is none
    of a language model.
    """
    shape = dict(settings.config or {})
    check_sizes(settings.name, shape)
    try:
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    except Exception as error:  # each model's configuration checks its own values, and raises what it likes
        raise UserError(
            "model.config of the preset is no configuration of a model: "
            f"{' '.join(str(error).split())[:400]}.",
            "Leave it out, or correct it.",
        ) from error
    check_supported(settings.name, config)
    return config


def check_quantisable(config: PretrainedConfig, quantisation: Quantisation) -> None:
    """Raise UserError for a model that computes with its weights in a way which 4-bit weights do not
    allow.
    """
    if quantisation == "nf4" and config.model_type in READ_DIRECTLY:
        raise UserError(
            f"A {config.model_type} model does not work in 4-bit.",
            "Set model.quantisation=none.",
        )


def says_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether `config.json`, or a section of it, says that the weights are quantized."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(section.get(key) for section in sections for key in QUANTIZATION_KEYS)


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for sizes in `config.json` that no model has: their mere layers would fill the
    memory.
    """
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, most in MOST.items():
            size, least = section.get(key), 0 if "experts" in key else 1
            if isinstance(size, int) and not least <= size <= most:
                raise UserError(
                    f"The config.json of the model {name} gives {key} as {size:.6g}, which no model has ("
                    f"{least} to {most:,}).",
                    "It is damaged: download or copy it again.",
                )


def check_supported(name: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model that writes no text token by token, or that reads more than text."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    is_whole = config.get_text_config() is config or getattr(config, "is_encoder_decoder", False)
    if not is_whole:
        raise UserError(
            f"The model {name} is a {kind}, which has parts for more than text.",
            "Only language models can be loaded: give a checkpoint of its text part alone.",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"The model {name} is a {kind}, no causal language model.",
            "Give a decoder such as a Llama, Mistral, Qwen or Gemma.",
        )


def _reason(error: Exception) -> str:
    """Return a library's complaint about a file on one line, without its full stop."""
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without its weights, on torch's meta device: nothing is allocated. Raises UserError
    where its sizes do not go together.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's own code raises at a size that it cannot have
        raise UserError(
            f"The model {config.name_or_path} cannot be built as its config.json describes it: "
            f"{_reason(error)}.",
            "Download or copy it again, or choose another.",
        ) from error
    return model


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint that a model, or its first layers, read, by name; and the configuration
    that goes with them.
    """

    tensors: dict[str, StoredTensor]
    config: PretrainedConfig
    """As in `config.json`, but untied where the checkpoint stores another matrix for what `config.json` ties:
    the stored one counts.
    """
    is_untied: bool
    """Whether the configuration was corrected so."""


def read_checkpoint(settings: ModelSettings, model: PreTrainedModel, layers: int | None = None) -> Checkpoint:
    """Find what the model, or its first `layers` layers, read of the checkpoint. `model` is the skeleton.

    Every use of a checkpoint begins here. Raises UserError where it cannot be had or would be misread (see
    `check_contents`).
    """
    tensors = {
        name: tensor
        for name, tensor in checkpoint_tensors(settings, layers).items()
        if is_needed(name, layers)
    }
    check_contents(settings.name, model, tensors)
    config = deepcopy(model.config)
    is_untied = bool(config.tie_word_embeddings and tied_otherwise(model, tensors))
    if is_untied:
        config.tie_word_embeddings = False
    return Checkpoint(tensors, config, is_untied)


def load_tokenizer(
    settings: ModelSettings, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer as `fit_tokenizer` leaves it. Raises UserError where it cannot be read or
    is another model's.

    `config` is the model's configuration where it is known already.
    """
    config = config or load_config(settings.model_copy(update={"quantisation": "none"}))
    source = locate(settings.name, settings.revision)
    folder = source.fetch_small_files()
    # Without its vocabulary, transformers would make an empty tokenizer.
    there = {name for name in TOKENIZERS if (folder / name).is_file()}
    if not there or (there == {"vocab.json"} and not (folder / "merges.txt").is_file()):
        raise UserError(
            f"The {source.words} holds no tokenizer: {TOKENIZERS[0]} is missing.",
            "Copy the tokenizer's files into it.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # the libraries for tokenizers raise whatever they like, bare Exceptions among it
        raise UserError(_unread_tokenizer(source, error)) from error
    tokenizer.name_or_path = settings.name
    fit_tokenizer(tokenizer, config.get_text_config().vocab_size, settings.name)
    return tokenizer


def _unread_tokenizer(source: Source, error: Exception) -> str:
    """Why a tokenizer cannot be read, and what to do. Raises UserError where one of its files is damaged."""
    # What transformers says of a damaged file names neither the file nor what is wrong with it.
    contents = {
        file.name: read_json(file) for name in TOKENIZER_JSON if (file := source.folder / name).is_file()
    }
    begin = f"The tokenizer of the {source.words} cannot be read"
    is_custom = "auto_map" in contents.get("tokenizer_config.json", {})
    if is_custom and ("trust_remote_code" in str(error) or TOKENIZERS[0] not in contents):
        return (
            f"{begin}: {CUSTOM_CODE}.\n"
            f"Give a model whose tokenizer is one of transformers, in a {TOKENIZERS[0]}."
        )
    if TOKENIZERS[0] in contents:
        return f"{begin}: {_reason(error)}.\nDownload or copy its files again."
    return (
        f"{begin}: it is there in an older form only, without {TOKENIZERS[0]}.\n"
        "Convert it once: pip install sentencepiece protobuf tiktoken, then in Python "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, embeddings: int, name: str) -> None:
    """Give the tokenizer a padding token that the model has, and no chat template where that fails.

    Padding falls back to the end-of-sequence token, then to token 0: no result depends on it. Raises
    UserError where words become tokens beyond the `embeddings` of the model.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(
        tokenizer.all_special_tokens
    )
    beyond = {
        number: word
        for word, number in tokenizer.get_vocab().items()
        if number >= embeddings and word not in special
    }
    if beyond:
        number = min(beyond)
        raise UserError(
            f'The tokenizer of {name} has the word "{beyond[number]}" as token {number}, but the model has '
            f"only tokens 0 to {embeddings - 1}.",
            "Give the tokenizer that the model was trained with, or resize the model's embeddings to the "
            "tokenizer.",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embeddings:
        ends = tokenizer.eos_token_id is not None and tokenizer.eos_token_id < embeddings
        tokenizer.pad_token = tokenizer.eos_token if ends else tokenizer.convert_ids_to_tokens(0)
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it can fail in any way
        LOGGER.warning(
            "The chat template of %s fails (%s). Prompts are given to the model as plain text instead.",
            name,
            error,
        )
        tokenizer.chat_template = None


def load_model(
    settings: ModelSettings,
    device: torch.device,
    layers: int | None = None,
    unquantised: Sequence[str] = (),
    quantisation: Quantisation | None = None,
    checkpoint: Checkpoint | None = None,
) -> PreTrainedModel:
    """Return the checkpoint's model as `build_model` gives it; with `layers`, only the files that hold the
    first ones are read.

    `quantisation` takes the place of the settings' own; `checkpoint` is what `read_checkpoint` gave where it
    was read already. Raises UserError where the checkpoint cannot be had, is cut short or lacks weights.
    """
    checkpoint = checkpoint or read_checkpoint(settings, skeleton(load_config(settings)), layers)
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    with open_weights(files, layers) as weights:
        place: torch.device | Literal["auto"] = "auto" if settings.device_map == "auto" else device
        how, dtype = quantisation or settings.quantisation, resolve_dtype(settings, device)
        model, missing = build_model(checkpoint.config, weights, place, layers, how, dtype, unquantised)
    _check_complete(settings.name, [name for name in missing if is_needed(name, layers)])
    _check_embeddings(settings.name, model)
    model.name_or_path = model.config.name_or_path = settings.name
    if layers is None:
        folder = locate(settings.name, settings.revision).fetch_small_files()
        with suppress(OSError):  # not every checkpoint has one
            model.generation_config = GenerationConfig.from_pretrained(folder)
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
    """Return the model on `device` (`auto`: on as many as it takes), frozen and in eval mode, and the names
    of weights that are missing or of another shape.

    Every weight is asked for (`weights[name][...]`) when its turn comes, and quantised before the next. With
    `layers` the model has only its first ones and no head. Modules named in `unquantised` keep `dtype`,
    whatever the rest is quantised to.
    """
    config = deepcopy(config)
    if layers is not None:
        keep_layers(config, layers)
        config.tie_word_embeddings = (
            True  # a head that is tied to the embeddings costs nothing until it is taken away
        )
    # It warns of optional CPU kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
    give_head_whole_rows(model)
    return model.requires_grad_(False).eval(), report["missing_keys"] | {
        name for name, *_ in report["mismatched_keys"]
    }


_QUANTISERS: dict[str, Callable[[torch.dtype, Sequence[str]], BitsAndBytesConfig | None]] = {
    "nf4": Nf4Config,
    "int8": lambda dtype, unquantised: BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["lm_head", *unquantised]
    ),
    "none": lambda dtype, unquantised: None,
}


def keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Leave the first layers of a model's shape."""
    whole = config.num_hidden_layers
    # What is listed per layer (layer_types, mlp_layer_types, no_rope_layers, ...) is cut along.
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def _check_complete(name: str, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"The checkpoint {name} lacks {len(missing)} weights, {min(missing)} among them.",
            "It is incomplete, does not fit its config.json, or is no causal language model: download it "
            "again, or choose another.",
        )


def _check_embeddings(name: str, model: PreTrainedModel) -> None:
    """Raise UserError for a checkpoint of zeros (a download that was reserved on the disk, but never filled)
    or of no numbers.
    """
    embeddings: Any = model.get_input_embeddings()
    weight = embeddings.weight
    if weight.device.type == "meta":
        return
    # Without a copy: embeddings may be the largest tensor of a model.
    lowest, highest = (float(value) for value in weight.aminmax())
    largest = max(-lowest, highest)
    if not 0 < largest < float("inf"):
        what = "are all zero" if largest == 0 else "hold values that are not finite"
        raise UserError(
            f"The checkpoint {name} is damaged: its embeddings {what}.",
            f"{COPY_AGAIN}",
        )


def keep_autograd_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for a CPU kernel that has no autograd.

    On CPUs with AVX512-BF16 the first forward pass in eval mode would do so; gradients then go missing
    without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def give_head_whole_rows(model: PreTrainedModel) -> None:
    """Copy what the head reads where it is a slice of hidden states, such as the last position of each prompt
    in a batch.

    In 16 bits on a CPU, PyTorch copies the head's weights once for each row of such a slice: 30 GB for 64
    prompts and 152,000 tokens, which took 700 times as long as the product.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_whole_rows)


def _whole_rows(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return a module's inputs with the first one contiguous in memory."""
    return (inputs[0].contiguous(), *inputs[1:])


def describe_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Count the model's weights and those in 4-bit, as they are loaded: `{"weights": n, "in_4bit": m}`."""
    packed = [state for parameter in model.parameters() if (state := getattr(parameter, "quant_state", None))]
    packed += [module.quant_state for module in model.modules() if isinstance(module, Bnb4bitParametrization)]
    quantised = sum(state.shape.numel() for state in packed)
    plain = sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
    return {"weights": quantised + plain, "in_4bit": quantised}
