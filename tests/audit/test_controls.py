"""The audit can be believed: what only refuses is caught as hidden, and what was never learned passes as gone. Real attacks, small budgets."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.robustness import Silent
from lowmem_rmu.audit.attacks import relearning, suffix
from lowmem_rmu.audit.context import prepare
from lowmem_rmu.audit.suite import ATTACKS, Audit
from lowmem_rmu.audit.verdict import controls
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.tiny.build import FORGOTTEN
from lowmem_rmu.tiny.controls import FOLDER

LIMIT = 60


def audit(unlearned: Path | ModelSettings, place: Path, *names: str) -> dict[str, Any]:
    audited = prepare(
        "control", load_preset("tiny"), unlearned, torch.device("cpu"), list(FORGOTTEN), LIMIT, 0
    )
    found = Audit(audited, place, place / "audit.json", Silent()).run(Audit.choose(names))
    return asdict(found)


def test_what_only_refuses_is_caught_as_hidden(tmp_path: Path) -> None:
    found = audit(FOLDER / "refusing", tmp_path, "ablation", "representation")
    assert found["base"] == 1.0
    assert found["unlearned"] < 0.4  # by its answers it has forgotten
    assert found["verdict"]["mark"] == "hidden"
    assert {each["attack"] for each in found["attacks"] if each["finding"] == "brought back"} == {
        "ablation",
        "representation",
    }


def test_what_was_never_learned_passes_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relearning, "MEASURED_AFTER", {"unlearned": (50,), "base": (1,)})
    monkeypatch.setattr(relearning, "STEPS", (50,))
    monkeypatch.setattr(relearning, "BENIGN", (10,))
    monkeypatch.setattr(suffix, "PROMPTS", 1)
    monkeypatch.setattr(suffix, "STEPS", 2)
    found = audit(ModelSettings(name=str(FOLDER / "ignorant")), tmp_path, *ATTACKS)
    assert found["unlearned"] < 0.4
    assert {
        each["attack"]: each["finding"] for each in found["attacks"] if each["finding"] != "found nothing"
    } == {"collateral": None}
    assert found["verdict"]["mark"] == "gone"


def test_the_shipped_adapter_names_no_path() -> None:
    assert (
        json.loads((FOLDER / "refusing/adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
        is None
    )


def test_what_was_found_of_both_stands_beside_other_audits() -> None:
    recorded = {each.name: asdict(each) for each in controls()}
    assert {name: each["mark"] for name, each in recorded.items()} == {
        "refusing": "hidden",
        "ignorant": "gone",
    }
    assert all(each["attacks"].keys() == ATTACKS.keys() for each in recorded.values())
