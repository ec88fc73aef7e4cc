import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from inline_snapshot import snapshot
from typer.testing import CliRunner

from lowmem_rmu.cli import run as command_line
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.data.corpora import read_documents
from lowmem_rmu.errors import UserError
from lowmem_rmu.export import reproduce
from lowmem_rmu.export.reproduce import write_reproduce
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain

QUESTION = '{"question": "Colour?", "choices": ["a", "b", "c", "d"], "answer": 0}\n'


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def test_the_folder_makes_the_same_adapter_to_the_byte_wherever_it_lies(
    forgetful: RunFolder, tmp_path: Path
) -> None:
    write_reproduce(forgetful, tmp_path / "export/reproduce")
    moved = tmp_path / "elsewhere/reproduce"
    shutil.move(tmp_path / "export", tmp_path / "elsewhere")
    header = (moved / "preset.yaml").read_text().splitlines()[0]
    assert header == snapshot("# python -m lowmem_rmu.run reproduce/preset.yaml --device cpu")
    app = typer.Typer()
    app.command()(command_line.run)
    place = [
        "--runs-dir",
        str(tmp_path / "runs"),
        "--name",
        "again",
        "--device",
        "cpu",
        "--stages",
        "unlearn",
    ]
    result = CliRunner().invoke(app, [str(moved / "preset.yaml"), *place])
    assert result.exit_code == 0, result.output
    again = tmp_path / "runs/again/adapter/adapter_model.safetensors"
    assert again.read_bytes() == (forgetful.adapter / "adapter_model.safetensors").read_bytes()
    assert record(moved)["adapter"] == {"adapter_model.safetensors": digest(again)}


def test_nothing_in_the_folder_says_where_it_was_written(forgetful: RunFolder, tmp_path: Path) -> None:
    write_reproduce(forgetful, tmp_path / "reproduce")
    written = "".join(file.read_text() for file in (tmp_path / "reproduce").glob("*.*"))
    assert str(Path.home()) not in written
    assert str(tmp_path) not in written
    assert str(Path(__file__).parent.parent.parent) not in written


def test_it_says_with_what_the_run_was_made(forgetful: RunFolder, tmp_path: Path) -> None:
    write_reproduce(forgetful, tmp_path / "reproduce")
    config, there = forgetful.config, record(tmp_path / "reproduce")
    assert {key: there[key] for key in ("seed", "device", "versions")} == {
        key: config[key] for key in ("seed", "device", "versions")
    }
    first, *lines = (tmp_path / "reproduce/requirements.txt").read_text().splitlines()
    assert first.startswith(
        f"# Python {config['versions']['python']}, lowmem-rmu {config['versions']['lowmem-rmu']}, on cpu ("
    )
    assert f"torch=={config['versions']['torch'].partition('+')[0]}" in lines
    assert f"peft=={config['versions']['peft']}" in lines
    assert len(lines) == len(config["versions"]) - 2


def made_up(folder: Path, **changes: Any) -> RunFolder:
    """A run's folder as far as it is read here: settings of own texts, and an adapter."""
    preset = load_preset("tiny").model_dump()
    for path, value in changes.items():
        *keys, last = path.split("__")
        node = preset
        for key in keys:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value
    run = RunFolder.create(folder, "own")
    versions = {"python": "3.11.7", "lowmem-rmu": "0.1.0", "torch": "2.13.0+cpu"}
    made = {
        "created": "2026-01-01T00:00:00+00:00",
        "versions": versions,
        "device": "cpu",
        "device_name": "a CPU",
        "seed": 0,
    }
    write_json(
        run.path / "config.json",
        made | {"settings": Preset.model_validate(preset).model_dump(), "model_revision": "abc123"},
    )
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return run


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Own texts: folders of corpora and of questions."""
    folder = tmp_path / "own texts"
    (folder / "notes/deep").mkdir(parents=True)
    (folder / "notes/b.md").write_text("Second ü")
    (folder / "notes/a.txt").write_text("First")
    (folder / "notes/deep/c.jsonl").write_text('{"text": "Third"}\n')
    (folder / "notes/photo.png").write_text("not read")
    (folder / "quiz/test").mkdir(parents=True)
    (folder / "quiz/test/one_test.csv").write_text("q,a,b,c,d,A\n")
    (folder / "quiz/two.jsonl").write_text(QUESTION)
    for file in folder.rglob("*"):
        os.utime(file, (0, 0))
    return folder


def test_own_texts_come_along_and_are_read_the_same(own: Path, tmp_path: Path) -> None:
    run = made_up(
        tmp_path / "runs",
        topics__compounds__corpus__source=str(own / "notes"),
        retain__corpora__0__source=str(own / "notes"),
        evaluation__tasks__subjects__source=str(own / "quiz"),
        evaluation__tasks__subjects__adjacent=[],
    )
    write_reproduce(run, tmp_path / "reproduce")
    again, texts = load_preset(str(tmp_path / "reproduce/preset.yaml")), tmp_path / "reproduce/texts"
    before = Preset.model_validate(run.config["settings"])
    assert (
        read_documents(again.topics["compounds"].corpus)
        == read_documents(before.topics["compounds"].corpus)
        == ["First", "Second ü", "Third"]
    )
    assert (
        again.retain.corpora[0].source == again.topics["compounds"].corpus.source == str(texts / "01-notes")
    )
    assert sorted(file.name for file in (texts / "01-notes").rglob("*")) == [
        "a.txt",
        "b.md",
        "c.jsonl",
        "deep",
    ]
    assert (
        Path(again.evaluation.tasks["subjects"].source) / "test/one_test.csv"
    ).read_text() == "q,a,b,c,d,A\n"
    changed = {"model", "topics", "retain", "evaluation"}
    assert again.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert again.topics["compounds"].model_dump(exclude={"corpus"}) == before.topics["compounds"].model_dump(
        exclude={"corpus"}
    )
    documents = [b'"First"\n', b'"Second \\u00fc"\n', b'"Third"\n']
    assert record(tmp_path / "reproduce")["corpora"]["retain.corpora.0"] == {
        "source": "notes",
        "documents": 3,
        "sha256": hashlib.sha256(b"".join(documents)).hexdigest(),
    }


@pytest.mark.parametrize("name", ["-rf *.txt", "..%2f$(x).txt", "ü.txt", "a\nb.txt"])
def test_odd_file_names_stay_within_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("odd")
    write_reproduce(
        made_up(tmp_path / "runs", topics__compounds__corpus__source=str(tmp_path / name)),
        tmp_path / "reproduce",
    )
    again = load_preset(str(tmp_path / "reproduce/preset.yaml")).topics["compounds"].corpus
    assert Path(again.source).parent == tmp_path / "reproduce/texts"
    assert read_documents(again) == ["odd"]


def test_a_model_of_the_hub_is_named_with_the_revision_that_the_run_had(tmp_path: Path) -> None:
    write_reproduce(
        made_up(tmp_path / "runs", model__name="owner/model", model__revision="main"), tmp_path / "reproduce"
    )
    model = load_preset(str(tmp_path / "reproduce/preset.yaml")).model
    assert (model.name, model.revision) == ("owner/model", "abc123")
    assert record(tmp_path / "reproduce")["model"] == {
        "name": "owner/model",
        "revision": "abc123",
        "files": {},
    }
    assert not (tmp_path / "reproduce/base_model").exists()


def test_a_large_local_model_is_not_copied_but_can_be_told_by_its_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "LARGEST_BASE", 1000)
    run = made_up(tmp_path / "runs")
    write_reproduce(run, tmp_path / "reproduce")
    assert not (tmp_path / "reproduce/base_model").exists()
    text = (tmp_path / "reproduce/preset.yaml").read_text()
    assert next(line for line in text.splitlines() if "base_model/" in line) == snapshot(
        "# The base model is not on the Hub and too large to come along: put it into base_model/; "
        "record.json has the sha256 of its files."
    )
    assert yaml.safe_load(text)["model"]["name"] == "./base_model"
    weights = Path(run.config["settings"]["model"]["name"]) / "model.safetensors"
    assert record(tmp_path / "reproduce")["model"]["files"]["model.safetensors"] == digest(weights)


def test_a_text_that_was_written_after_the_run_began_is_named(own: Path, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", topics__compounds__corpus__source=str(own / "notes"))
    (own / "notes/b.md").write_text("Rewritten")
    write_reproduce(run, tmp_path / "reproduce")
    lines = (tmp_path / "reproduce/preset.yaml").read_text().splitlines()
    line = next(line for line in lines if '"texts/01-notes/b.md"' in line)
    assert '"texts/01-notes/a.txt"' not in line
    assert line.partition("[")[0] == snapshot(
        "# Changed since the run began, so that the adapter may differ: "
    )


def test_a_corpus_of_the_hub_that_cannot_be_reached_says_so_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    run = made_up(tmp_path / "runs", topics__locks__corpus__source="owner/texts")
    write_reproduce(run, tmp_path / "reproduce")
    assert record(tmp_path / "reproduce")["corpora"]["topics.locks.corpus"] == {
        "source": "owner/texts",
        "sha256": None,
        "reason": snapshot("The data set owner/texts is not on this machine and the Hub cannot be reached."),
    }
    assert load_preset(str(tmp_path / "reproduce/preset.yaml")).topics["locks"].corpus.source == "owner/texts"


@pytest.mark.parametrize(
    "place", ["topics__compounds__corpus__source", "evaluation__tasks__locks__source", "model__name"]
)
def test_a_text_that_is_gone_is_named_and_nothing_is_left(tmp_path: Path, place: str) -> None:
    run = made_up(tmp_path / "runs", **{place: str(tmp_path / "gone.jsonl")})
    with pytest.raises(UserError) as caught:
        write_reproduce(run, tmp_path / "export/reproduce")
    assert plain(caught.value, file=tmp_path / "gone.jsonl") == snapshot(
        "<file>, which the run has read, does not exist any more.\n"
        "Put it back: without it the run cannot be made again."
    )
    assert list((tmp_path / "export").iterdir()) == []


def test_a_run_without_an_adapter(tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs")
    shutil.rmtree(run.adapter)
    with pytest.raises(UserError) as caught:
        write_reproduce(run, tmp_path / "reproduce")
    assert plain(caught.value, run=run.path) == snapshot(
        "Run <run> has no adapter that could be made again.\nGo on with it: --resume --name own"
    )
