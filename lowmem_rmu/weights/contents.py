"""What a checkpoint holds, against what the model that config.json describes would read of it.

transformers leaves out a tensor that the model has no place for, and casts any number to a float: the scales
of FP8 weights, a bias that config.json does not mention, or the constants of a quantization would go missing
without a word. Here they are errors.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lowmem_rmu.errors import UserError
from lowmem_rmu.weights.stored import DTYPES, StoredTensor

OLD_BUFFERS = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"\.masked_bias$",
    r"\.(attn|attention)\.bias$",
)
"""Constants that older versions of transformers stored, and that every model computes for itself."""
NAMED = 3


def check_contents(name: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UserError where the model would misread a checkpoint: for how a tensor is stored, or for further
    tensors next to it.

    `tensors` are those that are read; `model` is the skeleton. Tensors that belong to no weight of it are
    named in a warning.
    """
    places = places_of(model, tensors)
    parameters = {place for place, _ in model.named_parameters(remove_duplicate=False)}
    for stored, place in places.items():
        if place in parameters and tensors[stored].kind not in DTYPES:
            raise UserError(
                f"The checkpoint {name} is quantised already, or of a rare kind: {stored} is stored as "
                f"{tensors[stored].kind}.",
                "Give the original checkpoint, in float32, float16 or bfloat16.",
            )
    # What the model has no place for: refused next to a weight that is read, named elsewhere.
    there, modules = model.state_dict(), dict(model.named_modules())
    left_over = {stored: place for stored, place in places.items() if place not in there}
    parts = [
        stored
        for stored, place in left_over.items()
        if _is_part_of_a_weight(modules, model.base_model_prefix, stored, place)
    ]
    if parts:
        raise UserError(
            f"The checkpoint {name} holds {_listed(parts)}, which the model that its config.json describes "
            "does not have.",
            "It is quantised already, or its config.json is another model's. Give the original checkpoint.",
        )
    if left_over:
        words = (
            f"The checkpoint {name} holds {_listed(list(left_over))}, which the model does not have: left "
            "out."
        )
        logging.getLogger(__name__).warning(words)


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name what transformers loads each tensor of a checkpoint as: a parameter or buffer, or a name that the
    model does not have.

    What every model leaves out on purpose (constants that old checkpoints store) is not among them.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    there: dict[str, Any] = dict(model.state_dict())
    ignored = re.compile(
        "|".join(f"(?:{rule})" for rule in (*OLD_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())))
    )
    places: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        place, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if place not in there and name in there:
            place = name
        if place in there or not (ignored.search(place) or ignored.search(name)):
            places[name] = place
    return places


def _is_part_of_a_weight(modules: Mapping[str, nn.Module], prefix: str, *names: str) -> bool:
    """Return whether a tensor lies in a module with weights and nothing with weights below it, as the scale
    of a linear module does.
    """
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            module = (
                modules.get(path)
                or modules.get(f"{prefix}.{path}")
                or modules.get(path.removeprefix(f"{prefix}."))
            )
            if module is None:
                continue
            has_own = any(True for _ in module.parameters(recurse=False))
            if has_own and not any(True for child in module.children() for _ in child.parameters()):
                return True
            break  # within a larger part of the model
    return False


def tied_otherwise(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Name the tensors of a checkpoint that config.json ties to others, though the checkpoint stores other
    values for them.

    transformers then loads both and ties nothing (since its version 5; before, it dropped the stored values).
    """
    by_place = {place: stored for stored, place in places_of(model, tensors).items()}
    other = []
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in by_place and source in by_place:
            one, two = tensors[by_place[target]], tensors[by_place[source]]
            if (one.kind, one.shape) != (two.kind, two.shape) or one.digest() != two.digest():
                other.append(by_place[target])
    return sorted(other)


def _listed(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    more = f" and {len(names) - NAMED} more tensors" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
