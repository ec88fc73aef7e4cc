"""What the tensors of a checkpoint are in the model: transformers renames some, and fuses a matrix of every
expert into one parameter.
"""

from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from lowmem_rmu.weights.stored import Part


def model_parts(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Part]:
    """By the tensor's name, as transformers loads a checkpoint that holds `names`. `model` is the skeleton.

    Left out is what it would not load, and what it splits or computes in another way than fusing experts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters, parts, counts = (
        dict(model.named_parameters()),
        dict[str, Part](),
        defaultdict[tuple[str, str], int](int),
    )
    for name in sorted(names, key=dot_natural_key):  # the order in which experts are counted
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters:
            continue
        if pattern is None:
            parts[name] = Part(renamed, transposed=_is_transposed(model, renamed))
            continue
        if fuses_experts(by_pattern[pattern]):
            share, shares = (
                by_pattern[pattern].source_patterns.index(pattern),
                len(by_pattern[pattern].source_patterns),
            )
            parts[name] = Part(
                renamed, counts[renamed, pattern], share, shares, _is_transposed(model, renamed)
            )
            counts[renamed, pattern] += 1
    return parts


def fuses_experts(converter: WeightConverter) -> bool:
    """Return whether it stacks one matrix of every expert, or joins several of each below one another."""
    stacked, *joined = converter.operations
    below = len(joined) < 2 and all(isinstance(each, Concatenate) and each.dim == 1 for each in joined)
    return isinstance(stacked, MergeModulelist) and stacked.dim == 0 and below


def _is_transposed(model: PreTrainedModel, parameter: str) -> bool:
    module = model.get_submodule(parameter.rpartition(".")[0])
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
