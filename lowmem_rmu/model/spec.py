"""Everything that is known of a model before its weights are loaded: resolved once, and handed down to
whatever needs it.

    ModelSpec.of_preset(preset) -> spec.config, spec.skeleton, spec.tokenizer, ... -> spec.load(device)
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import ModelSettings, Preset, Rmu
from lowmem_rmu.model.adapters import add_adapter, trained_modules
from lowmem_rmu.model.counts import Weights, count_weights
from lowmem_rmu.model.identity import model_digest
from lowmem_rmu.model.layers import can_share_prefix, decoder_layers
from lowmem_rmu.model.loading import (
    Checkpoint,
    Quantisation,
    check_quantisable,
    config_of_preset,
    load_config,
    load_model,
    load_tokenizer,
    read_checkpoint,
    resolve_dtype,
    skeleton,
)
from lowmem_rmu.model.special_tokens import SpecialTokens, special_tokens


class ModelSpec:
    """A model by its settings. Each property is computed when it is first needed, and kept.

    Reading a property raises UserError where the model cannot be had, is damaged, or is one that this program
    cannot run.
    """

    def __init__(
        self, settings: ModelSettings, rmu: Rmu | None = None, trained: Sequence[str] | None = None
    ) -> None:
        """`rmu` says what is trained on the model, if anything; `trained` names the trained modules where
        they are known already.
        """
        self.settings = settings
        self.rmu = rmu
        self._trained = trained
        self._weights: dict[tuple[str, ...], Weights] = {}

    @classmethod
    def of_preset(cls, preset: Preset) -> "ModelSpec":
        """Return the model of a preset, with what the preset trains on it."""
        return cls(preset.model, preset.rmu)

    def with_precision(self, **changes: Any) -> "ModelSpec":
        """Return the same model with another `quantisation` or `dtype`. Everything known of it already stays
        known.
        """
        changed = copy(self)
        changed.settings = self.settings.model_copy(update=changes)
        return changed

    @property
    def name(self) -> str:
        """The Hub id, or the path of the local folder."""
        return self.settings.name

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's own configuration. Not to be changed."""
        return load_config(self.settings)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The whole model on torch's meta device: nothing is allocated. Not to be changed."""
        return skeleton(deepcopy(self.config))

    @cached_property
    def shape(self) -> PretrainedConfig:
        """The configuration that memory is estimated with: the preset's copy of a Hub model's, which needs no
        download, else `config`.
        """
        return config_of_preset(self.settings) if self._preset_has_shape else self.config

    @property
    def _preset_has_shape(self) -> bool:
        return self.settings.config is not None and not is_local(self.name)

    def weights(self, modules: Sequence[str]) -> Weights:
        """Count the weights of a model of this shape, and of the modules with these names, which are those
        that have adapters.
        """
        key = tuple(modules)
        if key not in self._weights:
            self._weights[key] = count_weights(self._shape_skeleton, key)
        return self._weights[key]

    @cached_property
    def _shape_skeleton(self) -> PreTrainedModel:
        return skeleton(deepcopy(self.shape)) if self._preset_has_shape else self.skeleton

    @cached_property
    def layer_count(self) -> int:
        """The number of decoder layers."""
        return len(decoder_layers(self.skeleton))

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def stored_dtype(self) -> str:
        """The name of the dtype that `config.json` gives the weights, such as `bfloat16`."""
        return str(self.config.dtype or torch.float32).removeprefix("torch.")

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of everything that is not quantized, on this device."""
        return resolve_dtype(self.settings, device)

    @cached_property
    def trained_modules(self) -> tuple[str, ...]:
        """Full names of the modules that are trained themselves (`rmu.trainable: weights`), which stay
        unquantized.
        """
        if self._trained is not None:
            return tuple(self._trained)
        return tuple(trained_modules(self.skeleton, self.rmu)) if self.rmu else ()

    @cached_property
    def can_share_prefix(self) -> bool:
        """Whether the prompts of a batch can share the keys and values of a common prefix."""
        return can_share_prefix(self.skeleton)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with a padding token."""
        return load_tokenizer(self.settings, self.config)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The token ids that the tokenizer puts in front of a text (`prefix`) and behind it (`suffix`)."""
        return special_tokens(self.tokenizer)

    def digest(self, device: torch.device) -> str:
        """Return what names the model's answers: a digest of everything that decides them."""
        return model_digest(self.settings, self.config, device, self.trained_modules)

    def check_adapter(self) -> None:
        """Put the adapter on the model without its weights. Raises UserError for settings of `rmu` that the
        model does not allow.
        """
        if self.rmu:
            add_adapter(deepcopy(self.skeleton), self.rmu, self.settings)

    def check_checkpoint(self, layers: int | None = None) -> None:
        """Check a local checkpoint, or its first layers, before any work. One of the Hub is checked once its
        files are here.

        Raises UserError as `checkpoint` does.
        """
        if is_local(self.name):
            self.checkpoint(layers)

    def checkpoint(self, layers: int | None = None) -> Checkpoint:
        """Find the tensors that the model, or its first layers, read of the checkpoint, which is downloaded
        if need be.

        Raises UserError where they cannot be had, or would be misread.
        """
        return read_checkpoint(self.settings, self.skeleton, layers)

    def load(
        self, device: torch.device, layers: int | None = None, quantisation: Quantisation | None = None
    ) -> PreTrainedModel:
        """Load the model, frozen and in eval mode: the whole, or only its first layers without a head.

        `quantisation` takes the place of the settings' own. Raises UserError where the checkpoint is
        incomplete or damaged.
        """
        check_quantisable(self.config, quantisation or self.settings.quantisation)
        checkpoint = self.checkpoint(layers)
        return load_model(self.settings, device, layers, self.trained_modules, quantisation, checkpoint)
