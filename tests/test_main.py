"""`python -m lowmem_rmu chat`: prompts that are too long, and an input that is closed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from inline_snapshot import snapshot
from typer.testing import CliRunner

from lowmem_rmu.__main__ import app
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain

ROOT = Path(__file__).resolve().parent.parent


def chat(run: RunFolder, *options: str, typed: str = "") -> tuple[int, str, str]:
    arguments = ["chat", str(run.path), "--device", "cpu", "--max-new-tokens", "4", *options]
    result = CliRunner().invoke(app, arguments, input=typed)
    return result.exit_code, result.stdout, result.stderr


def test_a_prompt_that_the_model_cannot_read_is_refused_at_once(forgetful: RunFolder) -> None:
    began = time.monotonic()
    code, out, said = chat(forgetful, "--prompt", "word " * 20_000)
    assert (code, out) == (2, "")
    [message] = [line for line in said.splitlines() if "512" in line]
    assert plain(message) == snapshot(
        "The conversation is 60008 tokens long with this prompt, and the answer may take 4 more: the model "
        "reads at most 512."
    )
    assert time.monotonic() - began < 60


def test_an_empty_prompt_is_refused(forgetful: RunFolder) -> None:
    code, _, said = chat(forgetful, "--prompt", " ")
    assert (code, plain(said)) == (
        2,
        snapshot("The prompt is empty.\nType a question, or choose one of the suggested prompts.\n"),
    )


def test_a_typed_prompt_that_is_too_long_ends_nothing(forgetful: RunFolder) -> None:
    code, out, said = chat(forgetful, typed="word " * 20_000 + "\nWhat colour is Yarinoxol?\n")
    assert code == 0
    [message] = [line for line in said.splitlines() if "512" in line]
    assert plain(message) == snapshot(
        "The conversation is 60007 tokens long with this prompt, and the answer may take 4 more: the model "
        "reads at most 512."
    )
    assert all(out.count(f"{side}: ") == 1 for side in ("base", "unlearned"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_closed_input_is_said_before_anything_is_loaded(forgetful: RunFolder) -> None:
    command = f'"{sys.executable}" -m lowmem_rmu chat "{forgetful.path}" <&-'
    result = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert plain("\n".join(result.stderr.splitlines()[-2:])) == snapshot(
        "There is no standard input to type prompts into.\nGive one with --prompt."
    )
    assert "Traceback" not in result.stderr
