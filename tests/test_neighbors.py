"""Passages about neighboring subjects: what the model writes, and the verb that saves it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from inline_snapshot import snapshot
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from lowmem_rmu import neighbors
from lowmem_rmu.__main__ import app
from lowmem_rmu.config.schema import Corpus, ModelSettings
from lowmem_rmu.data.corpora import read_documents
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.neighbors import BATCH, REQUESTS, NeighborPassage, save_passages, write_passages
from tests.texts import plain


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    settings = ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32")
    return load_model(settings, torch.device("cpu"))


def neighbors_verb(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app, ["neighbors", "tiny", *arguments, "--count", "3", "--max-new-tokens", "4", "--device", "cpu"]
    )
    return result.exit_code, result.stdout, result.stderr


def test_each_subject_gets_its_passages_and_the_seed_decides_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    done: list[tuple[int, int]] = []

    def write(seed: int) -> list[NeighborPassage]:
        return write_passages(
            model, tokenizer, ["trade", "law"], 5, 6, seed, lambda *written: done.append(written)
        )

    first = write(0)
    assert first == write(0)
    assert first != write(1)
    assert [passage.subject for passage in first] == ["trade"] * 5 + ["law"] * 5
    assert done == [(10, 10)] * 3
    assert all(passage.text == passage.text.strip() != "" for passage in first)


def test_a_batch_gives_what_each_request_alone_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes nothing. Both are greedy, as a draw depends on the batch."""
    generate = model.generate

    def greedy(**settings: object) -> object:
        return generate(**settings | {"do_sample": False, "top_p": None, "top_k": None, "temperature": None})  # type: ignore[arg-type]

    monkeypatch.setattr(model, "generate", greedy)
    together = write_passages(model, tokenizer, ["trade"], len(REQUESTS), 6)
    monkeypatch.setattr(neighbors, "BATCH", 1)
    assert write_passages(model, tokenizer, ["trade"], len(REQUESTS), 6) == together


def test_more_than_a_batch_is_written_in_several(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    done: list[tuple[int, int]] = []
    assert (
        len(
            write_passages(
                model, tokenizer, ["trade"], BATCH + 3, 6, on_batch=lambda *written: done.append(written)
            )
        )
        > BATCH
    )
    assert done == [(BATCH, BATCH + 3), (BATCH + 3, BATCH + 3)]


def test_a_model_that_answers_nothing_is_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "generate", lambda **settings: settings["input_ids"])
    with pytest.raises(UserError) as caught:
        write_passages(model, tokenizer, ["trade"], 2)
    assert plain(caught.value) == snapshot(
        "The model wrote nothing about trade.\nIs it a chat model? Give text of your own instead."
    )


def test_the_file_is_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "written.jsonl"
    save_passages(
        [NeighborPassage("law", "A \u2028 contract\nbinds."), NeighborPassage("law", "Überfall")], file
    )
    assert read_documents(Corpus(source=str(file))) == ["A \u2028 contract\nbinds.", "Überfall"]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_verb_writes_a_file_and_says_how_a_preset_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, said = neighbors_verb("trade", "law", "--to", "sub/mine.jsonl")
    assert code == 0, said
    lines = [json.loads(line) for line in Path("sub/mine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["subject"] for line in lines} == {"trade", "law"}
    assert "6 of 6" in said
    [corpus] = yaml.safe_load(out[out.index("retain:") :])["retain"]["corpora"]
    assert corpus == {"source": "./sub/mine.jsonl", "share": 0.3}


def test_the_verb_overwrites_nothing_and_takes_json_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("neighbors.jsonl").write_text("mine")
    code, _, said = neighbors_verb("trade")
    assert (code, plain(said)) == (
        2,
        snapshot("neighbors.jsonl exists already.\nDelete it, or choose another file with --to.\n"),
    )
    code, _, said = neighbors_verb("trade", "--to", "mine.txt")
    assert (code, plain(said)) == (
        2,
        snapshot(
            "The passages are JSON lines, and a corpus is read by its ending.\nName the file mine.jsonl.\n"
        ),
    )
    assert Path("neighbors.jsonl").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(neighbors, "write_passages", interrupted)
    code, _, said = neighbors_verb("trade", "--to", str(tmp_path / "mine.jsonl"))
    assert code == 130
    [line] = [line for line in said.splitlines() if "mine.jsonl" in line]
    assert plain(line, folder=tmp_path) == snapshot("Stopped. <folder>/mine.jsonl was not written.")
    assert list(tmp_path.iterdir()) == []
