"""LoRA adapters on the updated layers: made, loaded, saved and switched off for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lowmem_rmu.errors import UserError, nearest
from lowmem_rmu.model.layers import decoder_layers
from lowmem_rmu.presets import ModelSettings, Rmu


def check_layers(rmu: Rmu, layer_count: int) -> None:
    """Raises UserError where the target layer lies beyond the model."""
    if rmu.target_layer >= layer_count:
        raise UserError(
            f"rmu.target_layer is {rmu.target_layer}, but the model has {layer_count} layers: 0 to {layer_count - 1}.\n"
            f"The paper steers about a quarter of the way up: try {layer_count // 4}."
        )


def check_modules(model: nn.Module, rmu: Rmu) -> None:
    """Raises UserError where a name in `rmu.modules` is no linear module of an adapter layer; lists those there are."""
    layers = decoder_layers(model)
    there = {
        name.rpartition(".")[2] for index in rmu.adapter_layers for name, module in layers[index].named_modules() if isinstance(module, nn.Linear)
    }
    unknown = [name for name in rmu.modules if name not in there]
    if unknown:
        raise UserError(f'rmu.modules names "{unknown[0]}", which no adapter layer has. {nearest(unknown[0], there)}')


def add_adapter(model: PreTrainedModel, rmu: Rmu, settings: ModelSettings) -> PeftModel:
    """Puts a fresh adapter in float32 on the model: its output is unchanged until the adapter is trained."""
    check_layers(rmu, len(decoder_layers(model)))
    check_modules(model, rmu)
    config = LoraConfig(
        r=rmu.rank,
        lora_alpha=rmu.lora_alpha or rmu.rank,
        lora_dropout=0.0,
        target_modules=rmu.modules,
        layers_to_transform=rmu.adapter_layers,
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.name,
        revision=settings.revision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(rmu.seed)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on the model."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter.\nRun the unlearn stage first.")
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


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
