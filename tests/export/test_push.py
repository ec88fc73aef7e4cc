import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.export.push import push
from tests.texts import plain

TOKEN = "hf_secretSECRETsecretSECRETsecretSECRET"  # made up


class Hub(ThreadingHTTPServer):
    """A stand-in that speaks the Hub's calls for uploading a model, and keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.models: dict[str, bool] = {}
        """Whether each is private."""
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by their sha256, before a commit names them."""
        self.large = re.compile(r".*\.safetensors")
        self.refuses = 0
        """A status that every call is answered with."""
        self.against_the_card: list[str] = []
        self.calls: list[tuple[str, str | None]] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return self.refuses, {"error": "no"}
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        if method == "GET":
            name = path.removeprefix("/api/models/")
            return (
                (200, {"id": name, "private": self.models[name], "sha": "0" * 40})
                if name in self.models
                else (404, {"error": "no"})
            )
        if path == "/api/validate-yaml" and self.against_the_card:
            return 400, {"errors": [{"message": message} for message in self.against_the_card]}
        return 200, self.posted(path, body)

    def posted(self, path: str, body: bytes) -> Any:
        if path == "/api/validate-yaml":
            return {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            self.models.setdefault(
                f"{asked['organization']}/{asked['name']}", asked.get("visibility") == "private"
            )
            return {"url": f"{self.address}/{asked['organization']}/{asked['name']}"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if self.large.fullmatch(name) else "regular" for name in files}
            return {
                "files": [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "objects": [
                    each | {"actions": {"upload": {"href": f"{self.address}/store/{each['oid']}"}}}
                    for each in objects
                ]
            }
        assert "/commit/" in path, path
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.address}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}


class Call(BaseHTTPRequestHandler):
    server: Hub

    def handle_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.calls.append((f"{self.command} {path}", self.headers.get("Authorization")))
        status, content = self.server.answer(self.command, path, body)
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = handle_call

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as the command line has it
    # The stand-in keeps large files by git's LFS calls.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "reproduce").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [unlearning]\n---\n# Card")
    (folder / "SHA256SUMS").write_text("ab  model.safetensors\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "model-2.safetensors").write_bytes(b"more")
    (folder / "reproduce/preset.yaml").write_text("title: x")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_an_export_arrives_whole_and_private(hub: Hub, export: Path) -> None:
    before = contents(export)
    address = push(export, "me/model")
    assert address == f"{hub.address}/me/model/commit/{'1' * 40}"
    assert hub.created == [{"name": "model", "organization": "me", "visibility": "private"}]
    assert hub.files == before == contents(export)
    assert hub.stored.keys() == {
        hashlib.sha256(before[name]).hexdigest() for name in ("model.safetensors", "model-2.safetensors")
    }
    assert {authorisation for call, authorisation in hub.calls if not call.startswith("PUT")} == {
        f"Bearer {TOKEN}"
    }


def test_the_librarys_own_newer_way_of_uploading_is_as_private(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files would go to a store of its own, which the stand-in has not: here all are small."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = re.compile("none")
    push(export, "me/model")
    assert hub.created[0]["visibility"] == "private"
    assert hub.files == contents(export)


def test_public_is_said_in_so_many_words(hub: Hub, export: Path) -> None:
    push(export, "me/model", private=False)
    assert hub.created == [{"name": "model", "organization": "me", "visibility": "public"}]
    assert hub.files == contents(export)


def test_a_private_upload_does_not_land_in_a_model_that_is_public(hub: Hub, export: Path) -> None:
    hub.models["me/model"] = False
    with pytest.raises(UserError) as caught:
        push(export, "me/model")
    assert plain(caught.value) == snapshot(
        "me/model is there already, and everybody can read it. Nothing was uploaded.\n"
        "Choose another name, make it private on its page, or say that this upload may be public."
    )
    assert hub.files == {}
    push(export, "me/model", private=False)
    assert hub.files == contents(export)


def test_a_private_model_that_is_there_gets_the_new_files(hub: Hub, export: Path) -> None:
    hub.models["me/model"] = True
    push(export, "me/model")
    assert hub.files == contents(export)


def test_the_token_is_written_nowhere_and_told_to_nobody_else(
    hub: Hub, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(export, "me/model")
    hub.refuses = 401
    with pytest.raises(UserError) as caught:
        push(export, "me/model")
    assert TOKEN not in str(caught.value)
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not any(TOKEN.encode() in content for content in hub.files.values())
    assert TOKEN not in "".join(capsys.readouterr())


def test_the_hubs_own_login_is_used_too(
    hub: Hub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(TOKEN)
    push(export, "me/model")
    assert hub.calls[0][1] == f"Bearer {TOKEN}"


def refused(export: Path, name: str = "me/model") -> list[str]:
    with pytest.raises(UserError) as caught:
        push(export, name)
    return str(caught.value).splitlines()


def test_without_a_token(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refused(export) == snapshot(
        [
            "me/model cannot be uploaded: no token of the Hub was found.",
            (
                "Give one: `hf auth login`, or the environment variable HF_TOKEN. "
                "(https://huggingface.co/settings/tokens makes them.)"
            ),
        ]
    )
    assert hub.calls == []


@pytest.mark.parametrize(
    "name",
    ["model", "me/", "/model", "me/a/b", "me/mo del", "../model", "me/..", "", "me/model.git", "me\\model"],
)
def test_a_name_that_is_none(hub: Hub, export: Path, name: str) -> None:
    assert refused(export, name)[0].replace(f'"{name}" ', "<name> ", 1) == snapshot(
        '<name> is no name of a model on the Hub: give OWNER/NAME, of letters, digits, "-", "_" and ".", for '
        "example me/tiny."
    )
    assert hub.calls == []


@pytest.mark.parametrize("missing", ["README.md", "SHA256SUMS"])
def test_a_folder_that_is_no_complete_export(hub: Hub, export: Path, missing: str) -> None:
    (export / missing).unlink()
    message = refused(export)
    assert plain("\n".join(message), export=export) == snapshot(
        "<export> is no complete export: it lacks README.md or SHA256SUMS.\nExport the run again."
    )
    shutil.rmtree(export)
    assert refused(export) == message
    assert hub.calls == []


def test_where_the_hub_is_switched_off(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(export) == snapshot(
        [
            "me/model cannot be uploaded: HF_HUB_OFFLINE is on.",
            "Unset it, and TRANSFORMERS_OFFLINE, which means the same.",
        ]
    )
    assert hub.calls == []


def test_where_the_hub_cannot_be_reached(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(export) == snapshot(
        [
            "me/model cannot be uploaded: the Hub cannot be reached.",
            "Check the network, and run the same command again.",
        ]
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, snapshot("me/model cannot be uploaded: the Hub does not know the token that was found.")),
        (403, snapshot("me/model cannot be uploaded: the token that was found may not write there.")),
        (418, snapshot("me/model cannot be uploaded: the Hub answered with error 418.")),
    ],
)
def test_what_the_hub_refuses(hub: Hub, export: Path, status: int, message: str) -> None:
    hub.refuses = status
    assert refused(export)[0] == message


def test_a_card_that_the_hub_does_not_take(hub: Hub, export: Path) -> None:
    hub.against_the_card = ['"license" must be one of [mit, ...]']
    assert refused(export) == snapshot(
        [
            "me/model cannot be uploaded: the Hub does not take its card.",
            "Invalid metadata in README.md.",
            '- "license" must be one of [mit, ...]',
        ]
    )
    assert hub.files == {}


def test_any_other_error_passes_through(hub: Hub, export: Path) -> None:
    (export / "README.md").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        push(export, "me/model")
