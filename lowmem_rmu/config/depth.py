"""Layers given as a part of the model's depth."""

from pathlib import Path
from typing import Any

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.parsing import ParseError, parse_json

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What a model's configuration calls the number of its layers."""


def layers_by_depth(content: Any) -> Any:
    """Return a preset's content with `rmu.target_layer` and `rmu.adapter_layers` by the model's depth, where
    it leaves both out.

    The target layer lies a quarter of the way up, as in the WMDP paper, and the adapters on it and on the two
    layers below it. A target layer at a quarter and at 40% did equally well (docs/selectivity.md). Content
    that does not hold what is needed is returned as it is.
    """
    if not isinstance(content, dict) or not isinstance(content.get("rmu", {}), dict):
        return content
    rmu = content.get("rmu", {})
    layers = model_depth(content.get("model"))
    if layers is None or "target_layer" in rmu or "adapter_layers" in rmu:
        return content
    target = layers // 4
    found = {"target_layer": target, "adapter_layers": list(range(max(0, target - 2), target + 1))}
    return content | {"rmu": found | rmu}


def model_depth(model: Any) -> int | None:
    """Return the number of layers of a preset's model, None if it is not known here.

    A local model's own `config.json` says it, for a model on the Hub the preset's `model.config`.
    """
    if not isinstance(model, dict):
        return None
    name = model.get("name")
    config = local_config(name) if isinstance(name, str) and is_local(name) else model.get("config")
    if not isinstance(config, dict):
        return None
    # A multimodal model keeps the shape of its text part in a section.
    text = config.get("text_config")
    shape = config | text if isinstance(text, dict) else config
    depth = next((shape[key] for key in DEPTH_KEYS if key in shape), None)
    return depth if isinstance(depth, int) and depth > 0 else None


def local_config(folder: str) -> Any:
    """Return what the `config.json` of a model's folder holds, None where it cannot be read: loading the
    model says why.
    """
    try:
        return parse_json((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ParseError):
        return None
