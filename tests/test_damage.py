"""Every file of a finished run, damaged in every way, under every verb: one sentence and exit code 2, or a right result; never a traceback."""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from click.testing import Result
from markupsafe import Markup
from typer.testing import CliRunner

from lowmem_rmu import __main__ as verbs
from lowmem_rmu import inputs
from lowmem_rmu.audit import suite
from lowmem_rmu.chat import session
from lowmem_rmu.cli import run as command_line
from lowmem_rmu.export import reproduce, verification
from lowmem_rmu.memory import advice as fit
from lowmem_rmu.model.adapters import load_adapter
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.report import charts
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui import jobs, live
from lowmem_rmu.ui.tabs.export import verification_html
from lowmem_rmu.ui.tabs.results import choices
from lowmem_rmu.ui.tabs.runs import rows

CPU = ["--device", "cpu"]
SAFETENSORS = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
"""What PEFT and safetensors read by themselves, unseen by Python's audit hook."""


def the_run_verb() -> typer.Typer:
    app = typer.Typer()
    app.command()(command_line.run)
    return app


def resume(run: RunFolder) -> Result:
    """With the settings that the run had before anything was spoiled."""
    preset = str(run.path.parent.parent / "tiny.yaml")
    return CliRunner().invoke(
        the_run_verb(),
        [preset, "--runs-dir", str(run.path.parent), "--resume", "--name", run.path.name, *CPU],
    )


def talk(run: RunFolder) -> Result:
    return CliRunner().invoke(
        verbs.app, ["chat", str(run.path), "--prompt", "What is a lock?", "--max-new-tokens", "1", *CPU]
    )


def exported(*options: str) -> Callable[[RunFolder], Result]:
    def act(run: RunFolder) -> Result:
        to = run.path.parent.parent / "exported"
        shutil.rmtree(to, ignore_errors=True)
        return CliRunner().invoke(verbs.app, ["export", str(run.path), "--to", str(to), *options, *CPU])

    return act


def audited(run: RunFolder) -> Result:
    """Of an attack whose pieces are all there."""
    return CliRunner().invoke(
        verbs.app, ["audit", str(run.path), "--attacks", "ablation", "--limit", "10", *CPU]
    )


def page(run: RunFolder) -> Result:
    """What the page shows of a run before anything is clicked. It raises nothing at all."""
    names = [row[0] for row in rows(run.path.parent)]
    assert names == [run.path.name]
    assert choices(run.path.parent) == names
    live.progress(jobs.state_of(run), run)
    live.curves(run)
    verification_html(run.exports / "adapter")
    return CliRunner().invoke(verbs.app, ["--help"])


VERBS: dict[str, Callable[[RunFolder], Result]] = {
    "resume": resume,
    "chat": talk,
    "export the adapter": exported("--format", "adapter"),
    "export the model": exported("--format", "merged", "--no-verify"),
    "audit": audited,
    "page": page,
}


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def without_a_key(content: bytes) -> bytes:
    """One key less, wherever the last object has most of them; of rows the middle one."""
    try:
        found = json.loads(content)
    except ValueError:
        lines = content.splitlines()
        middle = json.loads(lines[len(lines) // 2])
        lines[len(lines) // 2] = json.dumps(dict(list(middle.items())[1:])).encode()
        return b"\n".join(lines) + b"\n"
    inner = found
    for _ in range(2):
        nested = [
            value
            for value in (inner.values() if isinstance(inner, dict) else inner)
            if value and isinstance(value, dict | list)
        ]
        inner = nested[-1] if nested and random.Random(len(content)).random() < 0.5 else inner
    if isinstance(inner, dict):
        inner.pop(next(iter(inner)))
    else:
        inner.pop()
    return json.dumps(found).encode()


def flipped(number: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = random.Random(number).randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncated,
    "garbage": lambda content: bytes(random.Random(1).randbytes(300)),
    "empty": lambda content: b"",
    "a list": lambda content: b"[1, 2]\n",
    "an object": lambda content: b'{"step": "x", "rows": 7}\n',
    "a number": lambda content: b"5\n",
    "zeros": lambda content: bytes(len(content)),
    "a key less": without_a_key,
} | {f"bit {number}": flipped(number) for number in range(3)}
TEXT_ONLY = {"a key less"}
FEW = ("truncated", "an object", "a key less", "bit 0")
"""For verbs that take half a second, so that the file stays quick: all files are spoiled, in the ways that differ most."""


@pytest.fixture(scope="module")
def spoilable(forgetful: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A finished run with an audit and an export, and every verb quick: charts are not drawn, one model serves all, nothing is asked twice."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("spoilable") / "runs"
        run = RunFolder(Path(shutil.copytree(forgetful.path, runs / forgetful.path.name)))
        (runs.parent / "tiny.yaml").write_text(yaml.safe_dump(run.config["settings"]), encoding="utf-8")
        loaded: dict[str, Any] = {}

        class LoadedBase(ModelSpec):
            def load(self, *_: Any, **__: Any) -> Any:
                return loaded.setdefault("base", command_load(run))

        patch.setattr(inputs, "read_inputs", cached(inputs.read_inputs))
        patch.setattr(fit, "check_fits", lambda *_: None)
        patch.setattr(suite, "prepare", cached(suite.prepare))
        patch.setattr(suite.Audit, "_too_large", lambda *_: None)
        patch.setattr(verification, "load_questions", cached(verification.load_questions))
        patch.setattr(reproduce, "read_documents", lambda corpus: ["text"])
        patch.setattr(reproduce, "checkpoint_files", lambda base: [])
        patch.setattr(session, "ModelSpec", LoadedBase)
        patch.setattr(
            session,
            "load_adapter",
            lambda model, folder: loaded.setdefault("adapted", load_adapter(model, folder)),
        )
        patch.setattr(
            verification, "_ask_adapter", lambda artefact, measured, device, progress: measured.unlearned
        )
        patch.setattr(charts, "as_svg", lambda name, draw, width: Markup("<svg></svg>"))
        for verb in (audited, exported("--format", "adapter")):
            result = verb(run)
            assert result.exit_code == 0, result.output
        shutil.move(runs.parent / "exported", run.exports / "adapter")
        yield run


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for calls that come to the same result in this file: its inputs are never damaged."""
    known: list[Any] = []

    def first(*arguments: Any, **named: Any) -> Any:
        if not known:
            known.append(function(*arguments, **named))
        return known[0]

    return first


def command_load(run: RunFolder) -> Any:
    from lowmem_rmu.model.loading import load_model
    from lowmem_rmu.runs.recorded import recorded_preset

    return load_model(recorded_preset(run.config["settings"], run.path).model, torch.device("cpu"))


def files_read(act: Callable[[], Any], folder: Path) -> set[str]:
    """Which files of a folder Python opens meanwhile."""
    seen, on = set[str](), True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            on
            and event == "open"
            and isinstance(arguments[0], str)
            and arguments[0].startswith(str(folder))
            and "r" in str(arguments[1])
        ):
            seen.add(str(Path(arguments[0]).relative_to(folder)))

    sys.addaudithook(hook)
    try:
        act()
    finally:
        on = False
    return seen


@pytest.mark.parametrize("verb", VERBS)
def test_no_damage_ends_in_a_traceback(spoilable: RunFolder, verb: str) -> None:
    run, act = spoilable, VERBS[verb]
    sound = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    changed = {path: path.stat().st_mtime_ns for path in sound}

    def put_back() -> None:
        """Whatever was spoiled, or written by the verb."""
        for path, content in sound.items():
            if not path.exists() or path.stat().st_mtime_ns != changed[path]:
                path.write_bytes(content)
                changed[path] = path.stat().st_mtime_ns

    results: list[Result] = []
    read = files_read(lambda: results.append(act(run)), run.path)
    assert results[0].exit_code == 0, results[0].output
    put_back()
    wrong = []
    for name in sorted(read | (SAFETENSORS if verb != "page" else set())):
        file = run.path / name
        for damage in DAMAGES if verb in ("chat", "page") else FEW:
            if (
                file not in sound
                or not sound[file]
                or (damage in TEXT_ONLY and file.suffix not in (".json", ".jsonl"))
            ):
                continue
            file.write_bytes(DAMAGES[damage](sound[file]))
            result = act(run)
            put_back()
            said = result.stderr.strip().splitlines()
            if not (
                result.exit_code == 0
                or (result.exit_code == 2 and isinstance(result.exception, SystemExit) and len(said) > 1)
            ):
                wrong.append(f"{name}, {damage}: {result.exit_code} {result.exception!r} {said[-2:]}")
    assert not wrong, "\n".join(wrong)
    assert len(read) > 2
