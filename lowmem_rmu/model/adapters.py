"""Adapters on the updated layers, of low rank or of whole matrices: made, loaded, saved and switched off for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from lowmem_rmu.errors import UserError, nearest
from lowmem_rmu.model.layers import decoder_layers, expert_shapes
from lowmem_rmu.presets import ModelSettings, Rmu


def check_layers(rmu: Rmu, layer_count: int) -> None:
    """Raises UserError where the target layer lies beyond the model."""
    if rmu.target_layer >= layer_count:
        raise UserError(
            f"rmu.target_layer is {rmu.target_layer}, but the model has {layer_count} layers: 0 to {layer_count - 1}.\n"
            f"The paper steers about a quarter of the way up: try {layer_count // 4}."
        )


def check_modules(model: nn.Module, rmu: Rmu) -> None:
    """Raises UserError where a name in `rmu.modules` is neither a linear module nor an experts' weight of an adapter layer; lists those there are."""
    layers = [decoder_layers(model)[index] for index in rmu.adapter_layers]
    experts = {_last(name) for layer in layers for name in expert_shapes(layer)}
    there = experts | {_last(name) for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in rmu.modules if name not in there]
    if unknown:
        raise UserError(f'rmu.modules names "{unknown[0]}", which no adapter layer has. {nearest(unknown[0], there)}')
    adapted = sorted(experts.intersection(rmu.modules))
    if len(adapted) > 1:  # PEFT nests them in an order that differs between a 4-bit model and any other
        raise UserError(f"rmu.modules names {' and '.join(adapted)} of the same experts: only one of them can have adapters.")
    if adapted and rmu.trainable == "weights":
        raise UserError(f"The experts' {adapted[0]} cannot be trained itself: set rmu.trainable=lora.")


def add_adapter(model: PreTrainedModel, rmu: Rmu, settings: ModelSettings) -> PeftModel:
    """Puts a fresh adapter in float32 on the model: its output is unchanged until the adapter is trained."""
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
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    _train_in_float32(peft_model)
    return _with_removable_experts(peft_model)


def _low_rank(model: nn.Module, rmu: Rmu) -> dict[str, Any]:
    """Fused experts are no modules but parameters, which PEFT takes by their full names and from any layer."""
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    experts = {f"{prefix}.{index}.{name}" for index in rmu.adapter_layers for name in expert_shapes(layers[index]) if _last(name) in rmu.modules}
    return {
        "target_modules": [name for name in rmu.modules if name not in {_last(expert) for expert in experts}],
        "layers_to_transform": rmu.adapter_layers,
        "layers_pattern": "layers",
        "target_parameters": sorted(experts) or None,
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class ExpertAdapter(ParamWrapper):
    """PEFT's adapter on fused experts, made to come off a weight that bitsandbytes keeps in 4-bit."""

    def _remove_parametrizations(self) -> None:
        """PEFT 0.21 looks for a class that it no longer puts there: its adapter stays on, and the next pass adds it again."""
        parametrizations: Any = self.get_base_layer().parametrizations
        on_weight = parametrizations[self.parameter_name]
        if len(on_weight) > 1:  # the first is the dequantisation, the last the adapter
            del on_weight[-1]
        else:
            super()._remove_parametrizations()


def _with_removable_experts(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.__class__ = ExpertAdapter
    return model


def _whole_matrices(model: nn.Module, rmu: Rmu) -> dict[str, Any]:
    """No low-rank part: the chosen modules are copied, and the copies are trained, saved and switched like an adapter."""
    return {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": trained_modules(model, rmu)}


def trained_modules(model: nn.Module, rmu: Rmu) -> list[str]:
    """Full names of the modules whose matrices are trained themselves: none with LoRA. They must be loaded unquantised."""
    if rmu.trainable == "lora":
        return []
    layers = decoder_layers(model)
    within = {module for index in rmu.adapter_layers for module in layers[index].modules()}
    return [name for name, module in model.named_modules() if module in within and name.rpartition(".")[2] in rmu.modules]


class Float32Linear(nn.Linear):
    """Computes in float32 whatever comes in, and answers in the same precision as it was asked."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


def _train_in_float32(model: PeftModel) -> None:
    """In 16 bits most of a small update would be rounded away. (LoRA's own weights are float32 already.)"""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name, module in wrapper.modules_to_save.items():
                copied = Float32Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                copied.load_state_dict({key: value.float() for key, value in module.state_dict().items()}, assign=True)
                wrapper.modules_to_save[name] = copied


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on the model."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter.\nRun the unlearn stage first.")
    return _with_removable_experts(PeftModel.from_pretrained(model, folder, is_trainable=trainable))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """A plain PEFT adapter: the adapter's weights alone, as safetensors."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """The base model: the adapter, if there is one, is off inside and on again after."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield
