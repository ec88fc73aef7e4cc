"""Where a model lies: names that mean one thing in every verb, and a Hub that gets one request per process."""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from huggingface_hub import HfApi, constants, get_session
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.paths import resolve_paths
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError
from lowmem_rmu.measure import find_subject
from lowmem_rmu.model.loading import load_config, load_model, load_tokenizer
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.weights import source
from lowmem_rmu.weights.source import commit_of, locate, read_json
from tests.texts import plain

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEAD = "http://127.0.0.1:9"
"""Nothing listens there: every connection is refused."""


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a Hub that may be asked, though not the real one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    return tmp_path / "hub"


def put_into_cache(model: Path, hub_cache: Path, revision: str = "main") -> Path:
    repository = hub_cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    return shutil.copytree(model, repository / "snapshots" / COMMIT)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that a request was sent to, whether or not anything answered.

    (huggingface_hub itself asks once per process for a list that has nothing to do with models.)
    """
    sent, client = list[str](), type(get_session())
    send = client.send

    def counted(self: Any, request: Any, **options: Any) -> Any:
        if "agent-harnesses" not in str(request.url):
            sent.append(str(request.url))
        return send(self, request, **options)

    monkeypatch.setattr(client, "send", counted)
    return sent


def all_of_a_run(settings: ModelSettings) -> torch.nn.Module:
    """Whatever a run reads of its model."""
    load_config(settings)
    load_tokenizer(settings)
    ModelSpec(settings).digest(CPU)
    commit_of(settings.name, settings.revision)
    return load_model(settings, CPU)


SETTINGS = ModelSettings(name="owner/name", quantisation="none", dtype="float32")


def mistake(load: Callable[[], Any], **changing: object) -> str:
    with pytest.raises(UserError) as caught:
        load()
    return plain(caught.value, **changing)


def test_a_dead_network_is_tried_once_per_run(
    small_model_folder: Path, hub_cache: Path, attempts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    put_into_cache(small_model_folder, hub_cache)
    with caplog.at_level(logging.WARNING):
        model = all_of_a_run(SETTINGS)
    assert len(attempts) == 1
    assert model.name_or_path == "owner/name"
    said = [record.getMessage() for record in caplog.records if record.name == "lowmem_rmu.weights.source"]
    assert [plain(line, commit=COMMIT[:12]) for line in said] == snapshot(
        [
            "The Hub cannot be asked for the model owner/name: it is used as it was last downloaded (commit <commit>)."
        ]
    )


def test_offline_the_cache_is_used_without_a_word(
    small_model_folder: Path,
    hub_cache: Path,
    attempts: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    put_into_cache(small_model_folder, hub_cache)
    with caplog.at_level(logging.WARNING):
        all_of_a_run(SETTINGS.model_copy(update={"revision": COMMIT}))
    assert (attempts, caplog.text) == ([], "")
    assert commit_of("owner/name") == COMMIT


def test_what_a_partial_download_lacks_is_told_in_words(small_model_folder: Path, hub_cache: Path) -> None:
    downloaded = put_into_cache(small_model_folder, hub_cache)
    (downloaded / "model.safetensors").unlink()
    assert mistake(lambda: load_model(SETTINGS, CPU)) == snapshot(
        "The model owner/name is not on this machine and the Hub cannot be reached.\n"
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
    )
    (downloaded / "config.json").unlink()
    assert mistake(lambda: load_config(SETTINGS)) == snapshot(
        "The model owner/name is not on this machine and the Hub cannot be reached.\n"
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
    )


def test_an_uncached_model_without_a_network_is_told_in_words() -> None:
    assert mistake(lambda: load_config(ModelSettings(name="owner/other"))) == snapshot(
        "The model owner/other is not on this machine and the Hub cannot be reached.\n"
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
    )


class Hub(BaseHTTPRequestHandler):
    """Answers for the files of one model as the Hub does, and counts."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": file.name} for file in self.folder.glob("*")]
            self.answer(
                json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode(),
                "application/json",
            )
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self.answer((self.folder / path.rpartition("/")[2]).read_bytes(), "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        name = f'"{abs(hash(content)):x}"'
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "ETag": name,
            "X-Repo-Commit": COMMIT,
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(small_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub with one model; gives what it was asked."""
    handler = type("OneModel", (Hub,), {"folder": small_model_folder, "asked": list[str]()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_is_asked_once_and_each_file_is_downloaded_once(
    hub: list[str], small_model_folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "HfApi", lambda: HfApi(endpoint=constants.ENDPOINT))
    model = all_of_a_run(SETTINGS)
    assert sum("/api/models/" in line for line in hub) == 1
    downloads = [line for line in hub if line.startswith("GET /owner/name/resolve/")]
    assert len(downloads) == len(set(downloads))
    ids = torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        expected = load_model(
            ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), CPU
        )(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert (hub_cache / "models--owner--name/refs/main").read_text() == COMMIT, (
        "or it would not be found without a network"
    )
    seen = len(hub)
    all_of_a_run(SETTINGS)
    assert len(hub) == seen


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main",
            snapshot(
                'The model "https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main" is an address of the Hub.\n'
                "Write its id: meta-llama/Llama-3.2-1B"
            ),
        ),
        (
            "hf.co/owner/name",
            snapshot('The model "hf.co/owner/name" is an address of the Hub.\nWrite its id: owner/name'),
        ),
        (
            "https://example.org/model.zip",
            snapshot(
                'The model "https://example.org/model.zip" is an address, which is not read.\n'
                "Give a Hub id (owner/name), or the path of a folder."
            ),
        ),
        (
            "s3://bucket/model",
            snapshot(
                'The model "s3://bucket/model" is an address, which is not read.\n'
                "Give a Hub id (owner/name), or the path of a folder."
            ),
        ),
        (
            "file:///home/me/llama",
            snapshot('The model "file:///home/me/llama" is a file address.\nWrite its path: /home/me/llama'),
        ),
        (
            "C:\\models\\llama",
            snapshot(
                'The model "C:\\models\\llama" is a path of Windows, or has \\ where this machine writes /.\n'
                "Give a folder of this machine: ./NAME or /NAME."
            ),
        ),
        (
            "models\\llama",
            snapshot(
                'The model "models\\llama" is a path of Windows, or has \\ where this machine writes /.\n'
                "Give a folder of this machine: ./NAME or /NAME."
            ),
        ),
        (
            "models/of/mine",
            snapshot(
                'The model "models/of/mine" is neither a Hub id nor a folder of this machine.\n'
                "A Hub id has the form owner/name; a local path starts with ./ or /."
            ),
        ),
        (
            "my model",
            snapshot(
                'The model "my model" is neither a Hub id nor a folder of this machine.\n'
                "A Hub id has the form owner/name; a local path starts with ./ or /."
            ),
        ),
        (
            "",
            snapshot(
                'The model "" is neither a Hub id nor a folder of this machine.\n'
                "A Hub id has the form owner/name; a local path starts with ./ or /."
            ),
        ),
        (
            "a" * 5000,
            snapshot(
                'The model "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..." is neither a Hub id nor a folder of this machine.\n'
                "A Hub id has the form owner/name; a local path starts with ./ or /."
            ),
        ),
    ],
)
def test_a_name_that_is_no_model_is_told_with_what_to_write(
    name: str, said: str, attempts: list[str]
) -> None:
    for load in (
        load_config,
        load_tokenizer,
        lambda settings: load_model(settings, CPU),
        lambda settings: ModelSpec(settings).digest(CPU),
    ):
        told = mistake(lambda load=load: load(ModelSettings(name=name)))
        assert told == said
        assert len(told) < 300
    assert attempts == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "/" + "a" * 5000,
            snapshot(
                "The path '/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' cannot be read: <reason>"
            ),
        ),
        ("./with\0nul", snapshot("The path './with\\x00nul' cannot be read: <reason>")),
        (
            "~nobody-of-this-name/model",
            snapshot("The path '~nobody-of-this-name/model' cannot be read: <reason>"),
        ),
    ],
)
def test_what_can_be_no_path_is_told_the_same_everywhere(name: str, said: str) -> None:
    loads: list[Callable[[], Any]] = [
        lambda: load_config(ModelSettings(name=name)),
        lambda: find_subject(name),
        lambda: resolve_paths({"name": name}, Path(), set(), "model"),
    ]
    for load in loads:
        told = mistake(load)
        reason = told.rpartition(": ")[2]  # the system's
        assert reason
        assert plain(told.removeprefix("model.name: "), reason=reason) == said
        assert len(told) < 300


def test_a_file_is_no_model_folder(small_model_folder: Path) -> None:
    settings = ModelSettings(name=str(small_model_folder / "model.safetensors"))
    assert mistake(lambda: load_config(settings), folder=small_model_folder) == snapshot(
        "The model folder <folder>/model.safetensors is a file and no folder.\n"
        "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id."
    )


@pytest.mark.parametrize("name", ["models/small", "small"])
def test_a_folder_without_dot_and_slash_is_that_folder_in_every_verb(
    name: str, small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_model_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / name)
    assert load_preset("tiny", [f"model.name={name}"]).model.name == here
    assert find_subject(name).spec.name == here
    preset = (
        (Path(source.__file__).parents[2] / "presets/tiny.yaml")
        .read_text()
        .replace("../lowmem_rmu/tiny/model", name)
    )
    (tmp_path / "own.yaml").write_text(preset)
    assert load_preset("own.yaml").model.name == here


def test_a_hub_id_that_is_also_a_folder_says_how_to_write_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert mistake(lambda: load_config(ModelSettings(name="owner/name"))) == snapshot(
        "The model owner/name is not on this machine and the Hub cannot be reached.\n"
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /.\n"
        "There is a folder owner/name here: write ./owner/name for it."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"a": 1',
            snapshot(
                "The file <folder>/config.json is damaged or cut short: <reason>\nDownload or copy it again."
            ),
        ),
        (
            b"",
            snapshot(
                "The file <folder>/config.json is damaged or cut short: <reason>\nDownload or copy it again."
            ),
        ),
        (
            b"[1]",
            snapshot(
                "The file <folder>/config.json is damaged or cut short: it holds no JSON object.\n"
                "Download or copy it again."
            ),
        ),
        (
            b"\xef\xbb\xbf{}",
            snapshot(
                "The file <folder>/config.json begins with a byte order mark, which JSON does not have.\n"
                "Save it again as UTF-8 without one."
            ),
        ),
        (
            b'{"a": "\xff"}',
            snapshot(
                "The file <folder>/config.json is damaged or cut short: <reason>\nDownload or copy it again."
            ),
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            snapshot(
                "<folder>/config.json is a Git LFS pointer (63 bytes) and not the file itself.\n"
                "Fetch the files with `git lfs pull` in their folder, or download the model again."
            ),
        ),
        (
            b"[" * 100_000,
            snapshot(
                "The file <folder>/config.json is damaged or cut short: <reason>\nDownload or copy it again."
            ),
        ),
        (
            b'{"a": ' + b"1" * 5000 + b"}",
            snapshot(
                "The file <folder>/config.json is damaged or cut short: <reason>\nDownload or copy it again."
            ),
        ),
    ],
    ids=["cut", "empty", "list", "mark", "no UTF-8", "pointer", "deep", "long number"],
)
def test_json_that_is_none_is_told_by_its_file(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    told = mistake(lambda: read_json(tmp_path / "config.json"), folder=tmp_path)
    # Python's own words may change with its version.
    assert re.sub("cut short: (?!it holds).+", "cut short: <reason>", told) == said


def test_a_located_folder_gives_what_it_holds_and_nothing_else(small_model_folder: Path) -> None:
    located = locate(str(small_model_folder))
    assert located.fetch("config.json") == small_model_folder / "config.json"
    assert located.fetch("no.json") is None
    assert located.commit is None
