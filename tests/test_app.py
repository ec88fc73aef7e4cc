"""`python app.py`: who may reach the page, and what it says where it cannot listen."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click.testing import Result
from inline_snapshot import snapshot
from typer.testing import CliRunner

import app
from lowmem_rmu.errors import UserError
from tests.texts import plain

OTHERS = snapshot(
    "Others could reach this page: give --auth-file FILE, or set LOWMEM_RMU_AUTH, or leave out --share and "
    "--host."
)
MALFORMED = snapshot(
    "--auth, --auth-file and LOWMEM_RMU_AUTH take user:password, with a colon between the two."
)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` sets is undone, and nobody's password counts here."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", app.AUTH):
        monkeypatch.setenv(name, "")


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def call(*arguments: str) -> Result:
    command = typer.Typer()
    command.command()(app.main)
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_this_machine_s_own_addresses(host: str) -> None:
    assert app.is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.168.0.7", "10.0.0.1", "example.org", "localhost.example.org", "", "127.1", "1::1"],
)
def test_any_other_address_counts_as_one_that_others_reach(host: str) -> None:
    assert not app.is_loopback(host)


@pytest.mark.parametrize("text", [None, ""])
def test_on_this_machine_alone_no_password_is_needed(text: str | None) -> None:
    assert app.parse_auth(text, "127.0.0.1", share=False) is None
    for host, share in (("127.0.0.1", True), ("0.0.0.0", False), ("example.org", False)):
        with pytest.raises(UserError) as caught:
            app.parse_auth(text, host, share)
        assert plain(caught.value) == OTHERS


@pytest.mark.parametrize("share", [True, False])
def test_a_password_may_hold_colons(share: bool) -> None:
    assert app.parse_auth("me:secret", "0.0.0.0", share) == ("me", "secret")
    assert app.parse_auth("me:se:cr:et", "127.0.0.1", share) == ("me", "se:cr:et")


@pytest.mark.parametrize("text", ["me", "me:", ":secret", ":", "me;secret"])
def test_half_a_password_is_none(text: str) -> None:
    with pytest.raises(UserError) as caught:
        app.parse_auth(text, "127.0.0.1", share=False)
    assert plain(caught.value) == MALFORMED


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], OTHERS),
        (["--share"], OTHERS),
        (["--host", "0.0.0.0", "--auth", "secret"], MALFORMED),
        (["--auth", "secret"], MALFORMED),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_loaded(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    result = call(*arguments, "--runs-dir", str(tmp_path / "runs"))
    assert (result.exit_code, plain(result.stderr.strip())) == (2, said)
    assert not (tmp_path / "runs").exists()
    assert os.environ["GRADIO_TEMP_DIR"] == ""


def test_the_password_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(app.AUTH, "no colon")
    result = call()
    assert (result.exit_code, plain(result.stderr.strip())) == (2, MALFORMED)


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    result = call("--device", "tpu", "--runs-dir", str(tmp_path))
    assert (result.exit_code, plain(result.stderr)) == (
        2,
        snapshot('There is no device "tpu": choose auto, cpu, cuda or mps.\n'),
    )


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_only_ports_that_there_are(port: str) -> None:
    result = call("--port", port)
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_a_port_in_use_is_told_with_the_next_one(port_in_use: int, tmp_path: Path) -> None:
    result = call("--port", str(port_in_use), "--device", "cpu", "--runs-dir", str(tmp_path / "runs"))
    assert result.exit_code == 2, result.output
    first, *_, last = result.stderr.strip().splitlines()
    problem, _, _ = first.partition(f":{port_in_use}: ")  # what follows are the system's own words
    assert plain(problem) == snapshot("The app cannot listen on 127.0.0.1")
    assert plain(last, next_port=port_in_use + 1) == snapshot(
        "Is it running already? Try --port <next_port>."
    )
    assert "Traceback" not in result.output
    assert os.environ["GRADIO_TEMP_DIR"] == str((tmp_path / "runs/.page").resolve())
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize("content", ["", "\n", "me", "me:\n"])
def test_a_file_without_a_password_opens_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "auth").write_text(content)
    result = call("--auth-file", str(tmp_path / "auth"))
    assert (result.exit_code, plain(result.stderr.strip())) == (2, MALFORMED)


def test_a_password_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    result = call("--auth-file", str(tmp_path / "none"))
    assert (result.exit_code, plain(result.stderr, file=tmp_path / "none")) == (
        2,
        snapshot("--auth-file <file> cannot be read: No such file or directory.\n"),
    )


def test_one_password_only(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("me:secret")
    result = call("--auth", "me:other", "--auth-file", str(tmp_path / "auth"))
    assert (result.exit_code, plain(result.stderr)) == (
        2,
        snapshot("--auth and --auth-file both name a password: give one of them.\n"),
    )


@pytest.mark.parametrize("way", ["option", "file", "environment"])
def test_a_password_on_the_command_line_is_warned_of(
    port_in_use: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The file wins over the environment: it was named for this start."""
    (tmp_path / "auth").write_text("me:secret\nmore\n")
    monkeypatch.setenv(app.AUTH, "" if way == "option" else "you:other")
    given = {
        "option": ["--auth", "me:secret"],
        "file": ["--auth-file", str(tmp_path / "auth")],
        "environment": [],
    }[way]
    seen: list[object] = []
    monkeypatch.setattr(app, "launch", lambda *arguments: seen.append(arguments[3]))
    result = call(*given, "--host", "0.0.0.0", "--runs-dir", str(tmp_path / "runs"))
    assert result.exit_code == 0, result.output
    assert seen == [("you", "other") if way == "environment" else ("me", "secret")]
    warnings = [plain(line) for line in result.stderr.splitlines() if "--auth" in line]
    assert warnings == (
        snapshot(
            ["Other users of this machine can read --auth. Use --auth-file FILE or LOWMEM_RMU_AUTH instead."]
        )
        if way == "option"
        else []
    )
    assert "secret" not in result.stderr


def test_what_is_no_host_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    result = call("--allowed-host", "a b", "--runs-dir", str(tmp_path / "runs"))
    assert (result.exit_code, plain(result.stderr)) == (
        2,
        snapshot(
            '--allowed-host "a b" is no host: give a name such as gpu.example.org, gpu.example.org:8443 or '
            "https://gpu.example.org.\n"
        ),
    )
    assert not (tmp_path / "runs").exists()
