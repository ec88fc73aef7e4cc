"""4-bit weights: NF4 with double quantisation for linear modules, as transformers does it, and for fused
experts, which it leaves out.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from lowmem_rmu.model.experts import is_expert_weight

METHOD = "nf4_with_experts"
# Model types that compute with a module's weight instead of calling the module.
READ_DIRECTLY = (
    "mamba",
    "falcon_mamba",
)
BLOCK, PIECE = 64, 2**22  # weights that share a quantisation constant; that are quantised at once


class Nf4Config(BitsAndBytesConfig):
    """The `quantization_config` of `from_pretrained`: arithmetic in `dtype`, and modules named in
    `unquantised` left as they are.
    """

    def __init__(self, dtype: torch.dtype, unquantised: Sequence[str] = ()) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *unquantised],  # it holds for 4 bits too
        )
        self.quant_method = METHOD  # type: ignore[assignment]


class _QuantiseAsLoaded(Bnb4bitQuantize):
    """Brings a weight to 4-bit as soon as it is read; experts as soon as all of a layer's are read and
    fused.
    """

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        missing_keys: set[str],
        **more: Any,
    ) -> Any:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            # GPT-2 keeps (inputs, outputs).
            if getattr(get_module_from_name(model, name)[0], "source_cls", None) is Conv1D:
                weight = weight.T.contiguous()
            # Else it stays on the list of what is missing.
            if weight.shape == model.get_parameter(name).shape:
                put_in_4_bit(*get_module_from_name(model, name), weight)
                missing_keys.discard(name)
        return {}  # nothing is left for the loader to put anywhere


@register_quantizer(METHOD)
class _Nf4Quantizer(Bnb4BitHfQuantizer):
    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **more: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return is_expert_weight(param_name, getattr(module, name)) or super().param_needs_quantization(
            model, param_name, **more
        )

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _QuantiseAsLoaded(self)


def put_in_4_bit(module: nn.Module, name: str, weight: Tensor) -> None:
    """Make the weight the module's parameter `name`: that of a `Linear4bit`, or one that is dequantised for
    as long as it is used.
    """
    packed, state = quantise(weight)
    constants = state.as_dict(packed=True)
    if isinstance(module, Linear4bit):
        module.weight = Params4bit.from_prequantized(packed, constants, device=weight.device, module=module)
    else:
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
        replace_parameter_4bit_prequantized(module, name, constants, weight.device)
    # Or transformers would draw it again.
    module._is_hf_initialized = True  # type: ignore[assignment]
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def quantise(weight: Tensor) -> tuple[Tensor, QuantState]:
    """NF4 with double quantisation, to the bit as bitsandbytes does it at once; in pieces, for on a CPU it
    takes 16 bytes a weight.
    """
    packed, states = zip(*(_quantise_once(piece) for piece in weight.reshape(-1).split(PIECE)), strict=True)
    constants = torch.cat([state.absmax for state in states])
    doubly, offset, of_constants = _quantise_constants(constants)
    return torch.cat(packed), QuantState(
        doubly, weight.shape, states[0].code, BLOCK, "nf4", weight.dtype, offset, of_constants
    )


def _quantise_once(weight: Tensor) -> tuple[Tensor, QuantState]:
    return quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")


def _quantise_constants(constants: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    offset = constants.mean()
    doubly, state = quantize_blockwise(constants - offset, blocksize=256)
    return doubly, offset, state


def kept_constants(pieces: Iterable[Tensor]) -> Tensor:
    """Return the constants of a weight's blocks as double quantization leaves them, one per `BLOCK` values;
    from its pieces in order.
    """
    doubly, offset, of_constants = _quantise_constants(
        torch.cat([_quantise_once(piece.reshape(-1))[1].absmax for piece in pieces])
    )
    return dequantize_blockwise(doubly, of_constants) + offset


def as_quantised(weight: Tensor, constants: Tensor) -> Tensor:
    """Return the weight's values as they are after quantisation, with the constants of its blocks."""
    pieces = zip(weight.reshape(-1).split(PIECE), constants.split(PIECE // BLOCK), strict=True)
    return torch.cat([_quantised_and_back(*piece) for piece in pieces]).view(weight.shape)


def _quantised_and_back(weight: Tensor, constants: Tensor) -> Tensor:
    packed, state = _quantise_once(weight)
    state.absmax = constants
    return dequantize_4bit(packed, state)


def quantised_parameters(model: PreTrainedModel, unquantised: Sequence[str]) -> set[str]:
    """Return names of what is brought to 4-bit when a model like this one, without weights, is loaded.
    `model` stays as it is.
    """
    model = deepcopy(model)
    quantizer = _Nf4Quantizer(Nf4Config(torch.float32, unquantised))
    quantizer._process_model_before_weight_loading(model, device_map=None)
    return {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}
