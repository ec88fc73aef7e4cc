"""What is printed: any text on any stream, and nothing that commands a terminal."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from lowmem_rmu.console import Console, prepare_streams, print_json, printable

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "\x1b]0;owned\x07\x1b[2Jlock\x9b31m \u202eabc\u202c\r\x00 →\t±\n"


def ascii_stream(monkeypatch: pytest.MonkeyPatch, name: str) -> io.BytesIO:
    written = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii", write_through=True))
    return written


def test_any_text_is_printed_where_the_stream_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (ascii_stream(monkeypatch, name) for name in ("stdout", "stderr"))
    prepare_streams()
    print("1.50 → 89.1 ± 0.5 … −3 ü 中 😀 \udcff")
    print("→ ü", file=sys.stderr)
    table = Table("Change ±")
    table.add_row("→ ü")
    Console().print(table)
    assert out.getvalue().splitlines()[0] == rb"1.50 -> 89.1 +- 0.5 ... -3 \u00fc \u4e2d \ud83d\ude00 \udcff"
    assert rb"-> \u00fc" in out.getvalue().splitlines()[-2]
    assert err.getvalue() == b"-> \\u00fc\n"


def test_json_stays_the_same_content_whatever_the_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"title": "→ ± ü 😀", "row": HOSTILE}
    out = ascii_stream(monkeypatch, "stdout")
    prepare_streams()
    print_json(content)
    assert json.loads(out.getvalue()) == content


def test_a_stream_that_cannot_be_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    prepare_streams()


def test_control_characters_are_left_out() -> None:
    assert printable(HOSTILE) == "]0;owned[2Jlock31m abc →\t±\n"


def test_the_console_writes_no_control_characters_of_others() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=60)
    console.print(HOSTILE, markup=False)
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    with Progress(console=console) as progress:
        progress.add_task(HOSTILE, total=1)
    shown = file.getvalue()
    assert "\x1b]0;" not in shown
    assert "\x1b[2Jlock" not in shown
    assert not {"\x07", "\x9b", "\u202e", "\x00"} & set(shown)
    assert "\x1b[" in shown, "Rich itself still moves the cursor"


@pytest.mark.parametrize(
    "arguments", [["-m", "lowmem_rmu.run", "--list"], ["-m", "lowmem_rmu", "chat", "→ü/x"]]
)
def test_every_entry_prints_on_an_ascii_stream(arguments: list[str], tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == (0 if "--list" in arguments else 2)
    assert (done.stdout + done.stderr).isascii()
