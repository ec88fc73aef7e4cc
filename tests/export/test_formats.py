"""`python -m lowmem_rmu export`: each format from the command line, and what it says."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from inline_snapshot import snapshot
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowmem_rmu.__main__ import app
from lowmem_rmu.export.gguf.llama import llama_is_there
from lowmem_rmu.export.merge import streamed as merge_module
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket, tickets
from tests.texts import plain

IDS = torch.arange(5, 37).reshape(2, 16)
MakeRun = Callable[..., RunFolder]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture
def sharded(small_model_folder: Path, stored_as: Callable[..., Path]) -> Path:
    return stored_as(small_model_folder, torch.float32, "100KB")


def test_merged_says_what_was_done_and_loads(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sharded)
    result = call(run.path, "--to", tmp_path / "merged", "--format", "merged")
    assert result.exit_code == 0, result.output
    linked = sum(
        os.path.samefile(tmp_path / "merged" / path.name, path) for path in sharded.glob("*.safetensors")
    )
    written = len(list(sharded.glob("*.safetensors"))) - linked
    lines = result.stdout.splitlines()
    assert plain(lines[0], written=f"{written} files") == snapshot("- 4 tensors merged, in <written>.")
    assert plain(lines[1], linked=f"{linked} other files") == snapshot(
        "- <linked> of weights linked: the same file as the original's, in two places. Never write into it; "
        "--copy makes copies."
    )
    assert plain(lines[-1], to=tmp_path / "merged") == snapshot("Exported: <to>")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_copies_and_an_unchecked_base_are_said(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sharded)
    run.matrices.unlink()
    lines = call(run.path, "--to", tmp_path / "merged", "--copy").stdout.splitlines()
    assert plain(lines[1], copied=lines[1].split()[1]) == snapshot(
        "- <copied> other files of weights copied."
    )
    assert lines[2] == snapshot(
        "- The run did not record what its model's matrices were: that the checkpoint is still the same "
        "could not be checked."
    )
    assert not any(
        os.path.samefile(tmp_path / "merged" / path.name, path) for path in sharded.glob("*.safetensors")
    )


def test_dequantised_from_the_command_line(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sharded)
    config = json.loads((run.path / "config.json").read_text())
    config["settings"]["model"]["quantisation"] = "nf4"
    (run.path / "config.json").write_text(json.dumps(config))
    result = call(run.path, "--to", tmp_path / "merged", "--base", "dequantised")
    assert result.stdout.split()[1] == "42", result.output


def test_the_adapter_is_a_plain_one(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sharded)
    assert call(run.path, "--to", tmp_path / "adapter", "--format", "adapter").exit_code == 0
    assert str(sharded.parent) not in (tmp_path / "adapter/adapter_config.json").read_text(), (
        "no place on this machine leaves it"
    )
    one, other = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharded), folder)(IDS).logits
        for folder in (tmp_path / "adapter", run.adapter)
    )
    assert torch.equal(one, other)


def refusal(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    return re.sub(r"^Export: .*\n", "", result.stderr).strip()


def test_refusals_are_messages(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run, to = make_run(sharded), tmp_path / "to"
    assert refusal(run.path, "--to", to, "--format", "adapter", "--base", "dequantised") == snapshot(
        "An adapter is added to a model only later, so --base does not go with --format adapter.\n"
        "Leave one of them out."
    )
    assert plain(refusal(run.path.with_name("mad"), "--to", to), runs=run.path.parent) == snapshot(
        'There is no run mad in <runs>. Did you mean "made"?'
    )
    run.adapter.rename(tmp_path / "away")
    for kind in ("adapter", "merged"):
        assert plain(refusal(run.path, "--to", to, "--format", kind), run=run.path) == snapshot(
            "Run <run> has no adapter yet.\nGo on with it until it has unlearned: --resume --name made"
        )
    assert not to.exists()


def test_ctrl_c_leaves_nothing_and_says_so(
    sharded: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "link_or_copy", interrupt)
    result = call(make_run(sharded).path, "--to", tmp_path / "merged")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == snapshot(
        "Stopped. Nothing is lost; go on with: the same command. (Of the export nothing was left.)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_a_run_cannot_give_is_said_and_the_export_is_kept(
    sharded: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(sharded)
    lines = call(run.path, "--to", tmp_path / "merged").stdout.splitlines()
    assert [plain(line, run=run.path) for line in lines[2:-1]] == snapshot(
        [
            (
                "- How to make it again is not in it: ./nowhere, which the run has read, does not exist any "
                "more. Put it back: without it the run cannot be made again."
            ),
            (
                "- Not verified: Run <run> has not measured base, so there is nothing to hold an export against. "
                "Go on with it: --resume --name made"
            ),
        ]
    )
    lines = call(run.path, "--to", tmp_path / "other", "--no-verify").stdout.splitlines()
    assert [plain(line, run=run.path) for line in lines[2:-1]] == snapshot(
        [
            (
                "- How to make it again is not in it: ./nowhere, which the run has read, does not exist any "
                "more. Put it back: without it the run cannot be made again."
            ),
        ]
    )


@pytest.mark.parametrize(
    ("format", "holds"),
    [
        ("adapter", {"adapter_config.json", "adapter_model.safetensors"}),
        (
            "merged",
            {
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
                "chat_template.jinja",
            },
        ),
        ("gguf", {"forgetful-q4_0.gguf", "forgetful-lora.gguf", "Modelfile"}),
    ],
)
def test_a_real_run_is_written_verified_and_described(
    forgetful: RunFolder, tmp_path: Path, format: str, holds: set[str]
) -> None:
    result = call(
        forgetful.path, "--to", tmp_path / "to", "--format", format, "--gguf-type", "q4_0", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "to").iterdir()}
    assert files == holds | {"README.md", "SHA256SUMS", "verification.json", "reproduce"}
    mark = json.loads((tmp_path / "to/verification.json").read_text())["mark"]
    assert mark == ("inconclusive" if format == "gguf" and not llama_is_there() else "verified")
    assert f": {mark}" in result.stdout
    for line in (tmp_path / "to/SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / "to" / name).read_bytes()).hexdigest() == digest
    assert not list(tickets(forgetful.path.parent)), "its turn is over"
    places = [str(place).encode() for place in (forgetful.path.parent, Path.cwd())]
    leaks = [
        path
        for path in (tmp_path / "to").rglob("*")
        if path.is_file() and any(place in path.read_bytes() for place in places)
    ]
    assert not leaks, "no place on this machine leaves it"
    assert not any(place in (forgetful.path / "report.html").read_bytes() for place in places)


def test_a_name_that_is_none_is_refused_before_anything_is_written(
    forgetful: RunFolder, tmp_path: Path
) -> None:
    assert refusal(forgetful.path, "--to", tmp_path / "to", "--push", "me").startswith('"me" ')
    assert not (tmp_path / "to").exists()


def test_an_export_waits_its_turn(sharded: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sharded)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])
    with one_at_a_time(run.path.parent):
        take_ticket(run.path.parent, "other", process.pid)
    threading.Thread(target=process.wait).start()
    result = call(run.path, "--to", tmp_path / "merged", "--no-verify")
    assert result.stderr.splitlines()[1] == snapshot("Waiting: other before this export.")
    assert result.exit_code == 0


def test_what_did_not_survive_is_not_uploaded(forgetful: RunFolder, tmp_path: Path) -> None:
    run, to = RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "runs/forgetful"))), tmp_path / "to"
    weights = load_file(run.adapter / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros_like(weight) for name, weight in weights.items()},
        run.adapter / "adapter_model.safetensors",
    )
    (run.path / "digests.json").unlink()  # as the message says for an adapter that was changed on purpose
    said = refusal(run.path, "--to", to, "--format", "adapter", "--push", "me/tiny", "--device", "cpu")
    assert plain("\n".join(said.splitlines()[-2:]), to=to) == snapshot(
        "Not uploaded: the update did not survive.\n"
        "If you want it to be there all the same: hf upload me/tiny <to>"
    )
    assert (to / "README.md").exists()
