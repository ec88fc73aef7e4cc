"""Adapters on the updated layers, of low rank or of whole matrices: made, loaded, saved and switched off for
a while.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError, nearest
from lowmem_rmu.model.experts import expert_parameters, expert_shapes, with_removable_experts
from lowmem_rmu.model.layers import decoder_layers, layers_name, linear_shapes
from lowmem_rmu.model.saved import WEIGHTS, read_adapter_settings


def check_layers(rmu: Rmu, layer_count: int) -> None:
    """Raise UserError where the target layer lies beyond the model."""
    if rmu.target_layer >= layer_count:
        raise UserError(
            f"rmu.target_layer is {rmu.target_layer}, but the model has {layer_count} layers: 0 to "
            f"{layer_count - 1}.",
            f"The paper steers about a quarter of the way up: try {layer_count // 4}.",
        )


def check_modules(model: nn.Module, rmu: Rmu) -> None:
    """Raise UserError where a name in `rmu.modules` is neither a linear module nor an experts' weight of an
    adapter layer; lists those there are.
    """
    layers = [decoder_layers(model)[index] for index in rmu.adapter_layers]
    experts = {_last(name) for layer in layers for name in expert_shapes(layer)}
    there = experts | {_last(name) for layer in layers for name in linear_shapes(layer)}
    unknown = [name for name in rmu.modules if name not in there]
    if unknown:
        raise UserError(
            f'rmu.modules names "{unknown[0]}", which no adapter layer has. {nearest(unknown[0], there)}'
        )
    adapted = sorted(experts.intersection(rmu.modules))
    if len(adapted) > 1:  # PEFT nests them in an order that differs between a 4-bit model and any other
        raise UserError(
            f"rmu.modules names {' and '.join(adapted)} of the same experts: only one of them can have "
            "adapters."
        )
    if adapted and rmu.trainable == "weights":
        raise UserError(f"The experts' {adapted[0]} cannot be trained itself: set rmu.trainable=lora.")
    transposed = [
        _last(name)
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, Conv1D)
    ]
    if rmu.trainable == "weights" and (of_conv1d := [name for name in rmu.modules if name in transposed]):
        raise UserError(
            f"{of_conv1d[0]} is a Conv1D, which cannot be trained itself: set rmu.trainable=lora."
        )


def add_adapter(model: PreTrainedModel, rmu: Rmu, settings: ModelSettings) -> PeftModel:
    """Put a fresh adapter in float32 on the model: its output is unchanged until the adapter is trained."""
    check_layers(rmu, len(decoder_layers(model)))
    check_modules(model, rmu)
    config = LoraConfig(
        r=rmu.rank,
        lora_alpha=rmu.lora_alpha or rmu.rank,
        lora_dropout=0.0,
        **_whole_matrices(model, rmu) if rmu.trainable == "weights" else _low_rank(model, rmu),
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.name,
        revision=settings.revision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(rmu.seed)
        try:
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise UserError(
                f"PEFT puts no adapter on {', '.join(rmu.modules)} of this model: {error}",
                "Choose others: rmu.modules.",
            ) from error
    _train_in_float32(peft_model)
    _check_places(peft_model, rmu)
    return with_removable_experts(peft_model)


def _check_places(model: PeftModel, rmu: Rmu) -> None:
    """Raise UserError where adapters are in other layers than those asked for.

    In a mixture of experts PEFT takes the names of a dense layer's modules for those of the experts, and of
    all layers.
    """
    layers = decoder_layers(model)
    learning = {
        index
        for index, layer in enumerate(layers)
        if any(parameter.requires_grad for parameter in layer.parameters())
    }
    # A layer of a hybrid model can lack the module.
    wanted = {
        index
        for index in rmu.adapter_layers
        if any(
            _last(name.removesuffix(".base_layer")) in rmu.modules
            for name, _ in layers[index].named_modules()
        )
        or any(_last(name) in rmu.modules for name in expert_shapes(layers[index]))
        or index in learning
    }
    if learning != wanted:
        raise UserError(
            f"PEFT puts the adapters for {', '.join(rmu.modules)} on layers {sorted(learning)} instead of "
            f"{sorted(wanted)}: some of these layers are dense, others have experts.",
            "Let rmu.adapter_layers name layers with experts only, or choose modules of the attention.",
        )


def _low_rank(model: nn.Module, rmu: Rmu) -> dict[str, Any]:
    """Return the options of a LoraConfig. PEFT takes fused experts by the full names of their parameters."""
    experts = expert_parameters(model, rmu.adapter_layers, rmu.modules)
    return {
        "target_modules": [name for name in rmu.modules if name not in {_last(expert) for expert in experts}],
        "layers_to_transform": rmu.adapter_layers,
        "layers_pattern": layers_name(model),
        "target_parameters": sorted(experts) or None,
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _whole_matrices(model: nn.Module, rmu: Rmu) -> dict[str, Any]:
    """Return the options of a LoraConfig without a low-rank part: the chosen modules are copied, and the
    copies are trained, saved and switched like an adapter.
    """
    return {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": trained_modules(model, rmu)}


def trained_modules(model: nn.Module, rmu: Rmu) -> list[str]:
    """Return the full names of the modules whose matrices are trained themselves: none with LoRA. They must
    be loaded unquantized.
    """
    if rmu.trainable == "lora":
        return []
    layers = decoder_layers(model)
    within = {module for index in rmu.adapter_layers for module in layers[index].modules()}
    return [
        name
        for name, module in model.named_modules()
        if module in within and name.rpartition(".")[2] in rmu.modules
    ]


class Float32Linear(nn.Linear):
    """Computes in float32 whatever comes in, and answers in the same precision as it was asked."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


def _train_in_float32(model: PeftModel) -> None:
    """Train whole matrices in float32: in 16 bits most of a small update would be rounded away. (LoRA's own
    weights are float32 already.)
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name, module in wrapper.modules_to_save.items():
                copied = Float32Linear(
                    module.in_features, module.out_features, module.bias is not None, device="meta"
                )
                copied.load_state_dict(
                    {key: value.float() for key, value in module.state_dict().items()}, assign=True
                )
                wrapper.modules_to_save[name] = copied


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model. Raises UserError where it is damaged, of a kind that has no effect
    here, or another model's.
    """
    kind = read_adapter_settings(folder)["peft_type"]
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        if kind != "LORA":
            _run_once(adapted)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        NotImplementedError,
        ImportError,
        RuntimeError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _does_not_fit(folder, model, str(error).strip().splitlines()) from error
    if missing := [str(each.message) for each in warned if "missing adapter keys" in str(each.message)]:
        raise _does_not_fit(folder, model, [f"{missing[0][:300]} ..."])
    if unknown := _without_a_place(adapted, folder / WEIGHTS):
        raise _does_not_fit(
            folder, model, [f"the model has no {unknown[0]}, nor {len(unknown) - 1} more of its tensors."]
        )
    return with_removable_experts(adapted)


def _run_once(model: PeftModel) -> None:
    """Show whether the kind of adapter can do with the model's weights: several kinds fail on 4-bit ones only
    once they are used.
    """
    inner: Any = model.get_base_model()
    with torch.inference_mode():
        inner.get_decoder()(
            input_ids=torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device),
            use_cache=False,
        )


def _does_not_fit(folder: Path, model: PreTrainedModel, reason: list[str]) -> UserError:
    """Make the error that quotes the first two lines of what PEFT says."""
    return UserError(
        f"The adapter {folder} cannot be put on the model {model.name_or_path}: "
        f"{' '.join(line.strip() for line in reason[:2])}",
        "Give the model that it was made for. (Kinds that do not go on 4-bit weights take --quantisation "
        "none.)",
    )


def _without_a_place(model: PeftModel, weights: Path) -> list[str]:
    """Return the tensors of an adapter that PEFT has left out, as it does without a word."""
    if getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None):
        return []  # PEFT renames them on the way
    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    return sorted(
        stored
        - get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        - model.state_dict().keys()
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save a plain PEFT adapter: the adapter's weights alone, as safetensors."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Switch to the base model: the adapter, if there is one, is off inside and on again after."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield
