"""The tab to take a result away: real adapters in zip files."""

import io
import json
import os
import zipfile
from pathlib import Path

import gradio as gr
import pytest
import torch
from peft import PeftModel

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.presets import load_preset
from lowmem_rmu.runs import RunFolder, write_json
from lowmem_rmu.ui.export import ExportTab, packed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the tiny model with an adapter, and one that has none yet."""
    runs_dir, preset = tmp_path_factory.mktemp("runs"), load_preset("tiny")
    model = add_adapter(load_model(preset.model, CPU), preset.rmu, preset.model)
    for age, name in enumerate(("newest", "older", "unfinished")):
        run = RunFolder.create(runs_dir, name)
        write_json(run.path / "config.json", {"settings": preset.model_dump()})
        os.utime(run.path / "config.json", (1e9 - age, 1e9 - age))
        if name != "unfinished":
            save_adapter(model, run.adapter)
    return runs_dir


@pytest.fixture
def tab(runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportTab:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / ".page"))
    with gr.Blocks():
        return ExportTab(runs_dir)


def test_runs_with_an_adapter_are_offered_newest_first(tab: ExportTab, tmp_path: Path) -> None:
    update = tab.refresh(None)
    assert (update["choices"], update["value"]) == (["newest", "older"], "newest")
    assert tab.refresh("older")["value"] == "older"
    assert tab.refresh("unfinished")["value"] == "newest"
    with gr.Blocks():
        nothing = ExportTab(tmp_path / "nowhere").refresh("gone")
    assert (nothing["choices"], nothing["value"]) == ([], None)


def test_the_packed_adapter_is_what_peft_loads(runs_dir: Path, tmp_path: Path) -> None:
    run = RunFolder(runs_dir / "newest")
    with zipfile.ZipFile(io.BytesIO(packed(run))) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == files
    assert "adapter_model.safetensors" in files
    PeftModel.from_pretrained(load_model(load_preset("tiny").model, CPU), tmp_path / "adapter")


def test_packing_leaves_the_run_as_it_was(runs_dir: Path) -> None:
    before = sorted(runs_dir.rglob("*"))
    packed(RunFolder(runs_dir / "newest"))
    assert sorted(runs_dir.rglob("*")) == before


def test_the_download_is_called_by_its_run(tab: ExportTab, tmp_path: Path) -> None:
    words, button = tab.pack("older")
    path = Path(button["value"])
    assert button["interactive"] is True
    assert path.name == "older-adapter.zip"
    assert path.is_relative_to(tmp_path / ".page"), "and lies where this page's files do"
    assert words == f"older-adapter.zip, {path.stat().st_size / 1e6:,.1f} MB"
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "Choose a run first.\nThere is none yet? Start one in the Unlearn tab."),
        ("", "Choose a run first.\nThere is none yet? Start one in the Unlearn tab."),
        ("unfinished", "Run unfinished has no adapter yet.\nResume it, and wait until it has unlearned."),
    ],
)
def test_what_cannot_be_packed_is_told(tab: ExportTab, name: str | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        tab.pack(name)
    assert str(caught.value) == said


@pytest.mark.parametrize("name", ["../newest", "/etc", "gone"])
def test_only_runs_are_packed(tab: ExportTab, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a run|There is no run gone in"):
        tab.pack(name)


def test_no_event_is_part_of_the_public_api(runs_dir: Path) -> None:
    with gr.Blocks() as page:
        ExportTab(runs_dir).wire(page.load)
    assert page.fns
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
