"""One tiny random model per family through the whole job, from the first question to the merged export."""

import json
from pathlib import Path

import pytest
import torch
import typer
from inline_snapshot import snapshot
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowmem_rmu.chat.conversation import Sampling
from lowmem_rmu.chat.session import ChatModel
from lowmem_rmu.cli import run as command_line
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.merge.streamed import merge
from lowmem_rmu.model.loading import load_config
from lowmem_rmu.runs.folder import RunFolder
from tests.families import NO_4_BIT, Family
from tests.texts import plain

CPU = torch.device("cpu")
DATA = Path(__file__).parent.parent / "lowmem_rmu/tiny/data"
PRESET = """
title: Family
model: {{name: {model}, quantisation: {quantisation}, dtype: float32}}
rmu: {{target_layer: 1, adapter_layers: [1], modules: [{module}], rank: 4, learning_rate: 1.0e-2, steps: 2, batch_size: 2}}
topics:
  locks: {{corpus: {{source: {data}/forget/locks.jsonl, held_out: 0.02}}, alpha: 10, max_tokens: 32}}
retain: {{corpora: [{{source: {data}/retain.jsonl, held_out: 0.002}}], max_tokens: 32}}
evaluation:
  tasks:
    locks: {{source: {data}/questions/locks.jsonl, role: forgotten}}
    compounds: {{source: {data}/questions/compounds.jsonl, role: kept, scoring: cloze}}
  limit: 6
  prompts: ["What color is Yarinoxol?"]
  max_new_tokens: 3
"""


def run_whole_job(family: Family, folder: Path, quantisation: str) -> RunFolder:
    app = typer.Typer()
    app.command()(command_line.run)
    preset = folder / "family.yaml"
    preset.write_text(
        PRESET.format(model=family.folder, quantisation=quantisation, module=family.module, data=DATA)
    )
    result = CliRunner().invoke(
        app,
        [str(preset), "--runs-dir", str(folder), "--name", "run", "--device", "cpu"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return RunFolder(folder / "run")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_whole_job(family: Family, tmp_path: Path) -> None:
    run = run_whole_job(family, tmp_path, "none" if family.name in NO_4_BIT else "nf4")
    assert run.read_status().state == "done"
    assert (run.path / "report.html").exists()
    summary = json.loads((run.path / "summary.json").read_text())
    assert {row["task"]: row["questions"] for row in summary["rows"]} == {"locks": 6, "compounds": 6}
    assert all(text["unlearned"] is not None for text in summary["texts"])
    base, unlearned = (run.read_evaluation(side) for side in ("base", "unlearned"))
    assert base
    assert unlearned
    assert base["texts"]["locks"]["loss"] != unlearned["texts"]["locks"]["loss"]
    # Chat answers on both sides, from the model that the run left.
    chat = ChatModel.of_run(run, CPU)
    assert set(chat.answers("What color is Yarinoxol?", Sampling(max_new_tokens=3))) == {"base", "unlearned"}
    # The merged export is PEFT's own merge bit for bit.
    merge(run, tmp_path / "merged")
    base_model = AutoModelForCausalLM.from_pretrained(family.folder, dtype=torch.float32)
    PeftModel.from_pretrained(base_model, run.adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = weights(tmp_path / "merged"), weights(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [name for name, tensor in weights(family.folder).items() if not torch.equal(ours[name], tensor)]


@pytest.mark.parametrize("family", NO_4_BIT, indirect=True)
def test_a_model_that_does_not_work_in_4_bit_is_refused_by_name(family: Family) -> None:
    with pytest.raises(UserError) as caught:
        load_config(ModelSettings(name=str(family.folder)))
    assert plain(caught.value) == snapshot(
        "A mamba model does not work in 4-bit.\nSet model.quantisation=none."
    )
