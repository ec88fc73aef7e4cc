"""Text of one's own: what is read of real files, how it is shown, and what a run is made of."""

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.data.corpora import load_samples, read_documents
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.loading import load_tokenizer
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui.uploads import (
    CHARACTERS,
    Own,
    describe,
    left_out_of,
    read,
    texts_among,
    topic_name,
    with_own_text,
)
from tests.texts import plain, text_with

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(1)> & \"so\""
FORGET = "the forget set"


@pytest.fixture
def preset() -> Preset:
    return load_preset("tiny")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.reserve(tmp_path / "runs", "mine")


@pytest.fixture
def dropped(tmp_path: Path) -> Callable[..., list[str]]:
    """Files as a browser leaves them: each in a folder of its own, so that two may have the same name."""

    def drop(*files: tuple[str, str | bytes]) -> list[str]:
        page = tmp_path / "page"
        before = len(list(page.glob("*")))
        paths = [page / f"{number:064x}" / name for number, (name, _) in enumerate(files, start=before)]
        for path, (_, content) in zip(paths, files, strict=True):
            path.parent.mkdir(parents=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(path) for path in paths]

    return drop


Dropped = Callable[..., list[str]]


def shown(html: str) -> list[str]:
    """What the quotations hold."""
    return re.findall(r"<blockquote>(.*?)</blockquote>", html, re.DOTALL)


def mistake(files: list[str], preset: Preset) -> str:
    with pytest.raises(UserError) as caught:
        describe(files, preset, FORGET)
    return str(caught.value)


def test_nothing_dropped_shows_nothing(preset: Preset) -> None:
    assert describe(None, preset, FORGET) == describe([], preset, FORGET) == ""


def test_one_file_is_told_with_its_tokens_and_what_cannot_be_measured(
    dropped: Dropped, preset: Preset
) -> None:
    text = "The compound Yarinoxol is amber."
    html = describe(dropped(("a.txt", text)), preset, FORGET)
    tokens = len(load_tokenizer(preset.model)(text)["input_ids"])
    assert plain(text_with(html, "1 document"), tokens=f"{tokens} tokens") == snapshot(
        "1 file, 1 document, <tokens> in 1 samples. All of it is trained on, so its loss on unseen text "
        "cannot be told: give several files, or a .jsonl file with a text a line."
    )
    assert shown(html) == [f"{text} …"]


def test_files_of_every_kind_are_read(dropped: Dropped, preset: Preset) -> None:
    lines = '{"text": "third"}\n{"text": "fourth"}\n'
    html = describe(dropped(("a.txt", "first"), ("B.MD", "# second"), ("c.JSONL", lines)), preset, FORGET)
    assert text_with(html, "4 documents") == snapshot(
        "3 files, 4 documents, 17 tokens in 4 samples. 10% of the documents are kept aside, to see "
        "afterwards whether unseen text is forgotten too."
    )
    assert shown(html) == ["first …", "# second …", "third …"], "the beginnings of three"


def test_files_of_the_same_name_are_all_read(dropped: Dropped, preset: Preset, tmp_path: Path) -> None:
    files = dropped(("same.txt", "one"), ("same.txt", "two"), ("same.txt", "three"))
    assert shown(describe(files, preset, FORGET)) == ["one …", "two …", "three …"]
    corpus, documents = read(files, tmp_path / "kept", FORGET)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0001.txt", "0002.txt", "0003.txt"]
    assert read_documents(corpus) == documents == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["page.txt", "page.md"])
def test_markup_in_a_document_stays_text(dropped: Dropped, preset: Preset, name: str) -> None:
    html = describe(dropped((name, f"<!DOCTYPE html><html><body>{HOSTILE}</body></html>")), preset, FORGET)
    assert not re.search(r"<(?!/?(p|strong|blockquote)>)", html)
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in shown(html)[0]


def test_long_text_is_shown_by_its_beginning(dropped: Dropped, preset: Preset) -> None:
    assert shown(describe(dropped(("a.txt", "  \n" + "é" * 1000)), preset, FORGET)) == [
        "é" * CHARACTERS + " …"
    ]


def test_without_its_tokenizer_characters_are_counted(
    dropped: Dropped, preset: Preset, tmp_path: Path
) -> None:
    absent = preset.model_copy(
        update={"model": preset.model.model_copy(update={"name": str(tmp_path / "absent")})}
    )
    assert text_with(describe(dropped(("a.txt", "amber")), absent, FORGET), "1 document") == snapshot(
        "1 file, 1 document, 5 characters. All of it is trained on, so its loss on unseen text cannot be "
        "told: give several files, or a .jsonl file with a text a line."
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            [("page.html", "<p>so</p>")],
            snapshot(
                "page.html is a formatted document, which is not read here.\nSave its text as .txt, in UTF-8."
            ),
        ),
        (
            [("image.png", PNG)],
            snapshot("image.png is a .png file, which is not read here.\nGive a .txt, .md, .jsonl file."),
        ),
        (
            [("none", "no ending")],
            snapshot(
                "none is a file without a suffix, which is not read here.\nGive a .txt, .md, .jsonl file."
            ),
        ),
        (
            [("good.txt", "so"), ("image.txt", PNG)],
            snapshot("image.txt is not UTF-8 text (byte 0).\nSave it as UTF-8."),
        ),
        (
            [("good.txt", "so"), ("wide.md", "so".encode("utf-16"))],
            snapshot("wide.md is not UTF-8 text (byte 0).\nSave it as UTF-8."),
        ),
        (
            [("wide.txt", "so".encode("utf-16-le"))],
            snapshot(
                "wide.txt is not UTF-8 text (it holds NUL characters or half of a pair).\nSave it as UTF-8."
            ),
        ),
        (
            [("zeros.txt", bytes(99))],
            snapshot(
                "zeros.txt is not UTF-8 text (it holds NUL characters or half of a pair).\nSave it as UTF-8."
            ),
        ),
        (
            [("old.txt", "schön".encode("latin-1"))],
            snapshot("old.txt is not UTF-8 text (byte 3).\nSave it as UTF-8."),
        ),
        (
            [("rows.jsonl", '{"text": "so"}\n{"body": "so"}')],
            snapshot('rows.jsonl, line 2: expected a JSON object with the key "text".'),
        ),
        ([("rows.jsonl", '{"text": 3}')], snapshot('rows.jsonl, line 1: "text" is no text.')),
        ([("rows.JSONL", "so")], snapshot('rows.JSONL, line 1: expected a JSON object with the key "text".')),
        (
            [("empty.txt", ""), ("blank.md", " \n\t\n"), ("empty.jsonl", "")],
            snapshot("There is no text in what you gave as the forget set.\nGive files that are not empty."),
        ),
    ],
)
def test_what_cannot_be_read_is_told_by_the_name_it_came_with(
    dropped: Dropped, preset: Preset, folder: RunFolder, files: list[tuple[str, str | bytes]], said: str
) -> None:
    paths = dropped(*files)
    assert plain(mistake(paths, preset)) == said
    for own in (Own(paths, [], "storms"), Own([], paths, "")):
        with pytest.raises(UserError) as caught:
            with_own_text(preset, own, folder)
        assert plain(str(caught.value).replace("the retain set", FORGET)) == said
        assert own.forget or FORGET not in str(caught.value)


def test_without_own_text_the_preset_stays(preset: Preset, folder: RunFolder) -> None:
    assert with_own_text(preset, Own([], [], "storms"), folder) is preset
    assert not (folder.path / "texts").exists()


def test_own_text_takes_the_place_of_both_sets(dropped: Dropped, preset: Preset, folder: RunFolder) -> None:
    forget, retain = (
        dropped(("a.txt", "storm"), ("b.txt", "wind")),
        dropped(("c.jsonl", '{"text": "cheese"}')),
    )
    changed = with_own_text(preset, Own(forget, retain, " Tropical Cyclones! "), folder)
    [(name, topic)] = changed.topics.items()
    assert (name, topic.about, topic.alpha) == (
        "tropical_cyclones",
        "Tropical Cyclones!",
        preset.topics["compounds"].alpha,
    )
    assert read_documents(topic.corpus) == ["storm", "wind"]
    assert read_documents(changed.retain.corpora[0]) == ["cheese"]
    assert changed.retain.max_tokens == preset.retain.max_tokens
    assert {Path(each.source).parent for each in (topic.corpus, changed.retain.corpora[0])} == {
        (folder.path / "texts").resolve()
    }
    assert changed.rmu == preset.rmu
    assert changed.model == preset.model


def test_what_was_dropped_may_go_once_the_run_has_its_copy(
    dropped: Dropped, preset: Preset, folder: RunFolder
) -> None:
    files = dropped(("a.txt", "storm"))
    changed = with_own_text(preset, Own(files, [], "storms"), folder)
    Path(files[0]).unlink()
    assert read_documents(changed.topics["storms"].corpus) == ["storm"]


def test_only_the_sets_that_were_given_change(dropped: Dropped, preset: Preset, folder: RunFolder) -> None:
    kept = with_own_text(preset, Own([], dropped(("a.txt", "cheese")), ""), folder)
    assert kept.topics == preset.topics
    assert kept.evaluation == preset.evaluation
    assert kept.retain != preset.retain


def test_nobody_expects_the_preset_s_own_topics_to_be_forgotten_then(
    dropped: Dropped, preset: Preset, folder: RunFolder
) -> None:
    changed = with_own_text(preset, Own(dropped(("a.txt", "storm")), [], "storms"), folder)
    roles = {name: (task.role, task.adjacent) for name, task in changed.evaluation.tasks.items()}
    measured, kept = ("measured", []), ("kept", [])
    assert roles == {
        "compounds": measured,
        "locks": measured,
        "crystals": measured,
        "subjects": kept,
        "held_out": kept,
    }
    assert {name: task.source for name, task in changed.evaluation.tasks.items()} == {
        name: task.source for name, task in preset.evaluation.tasks.items()
    }


@pytest.mark.parametrize(("documents", "held_out"), [(1, 0), (2, 1), (10, 1), (40, 4)])
def test_a_tenth_is_held_out_where_there_are_several_documents(
    dropped: Dropped, preset: Preset, folder: RunFolder, documents: int, held_out: int
) -> None:
    lines = "".join(f'{{"text": "The storm {number} blew."}}\n' for number in range(documents))
    changed = with_own_text(preset, Own(dropped(("a.jsonl", lines)), [], "storms"), folder)
    samples = load_samples(changed.topics["storms"].corpus, load_tokenizer(preset.model), 64)
    assert (len(samples.train), len(samples.held_out)) == (documents - held_out, held_out)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Tropical cyclones", "tropical_cyclones"),
        ("  a.b=c: {d}\n", "a_b_c_d"),
        ("../../etc/passwd", "etc_passwd"),
        ("<script>alert(1)</script>", "script_alert_1_script"),
        ("Öl & Gas", "öl_gas"),
        ("化学", "化学"),
        ("covid-19", "covid-19"),
        ("x" * 99, "x" * 40),
        ("!?", "own_text"),
        ("", "own_text"),
        ("___", "own_text"),
        ("Retain", "own_text"),  # what the kept set is called in every table
    ],
)
def test_a_topic_is_called_by_what_was_typed(words: str, name: str) -> None:
    assert topic_name(words) == name


@pytest.mark.parametrize("words", ["null", "123", "yes", "a: b", "Öl & Gas", "..", "Retain"])
def test_an_odd_topic_survives_the_preset_file(
    dropped: Dropped, preset: Preset, folder: RunFolder, words: str
) -> None:
    changed = with_own_text(preset, Own(dropped(("a.txt", "storm")), [], words), folder)
    path = folder.path / "tiny.yaml"
    path.write_text(yaml.safe_dump(changed.model_dump(), allow_unicode=True), encoding="utf-8")
    assert load_preset(str(path)) == changed
    assert list(changed.topics) == [topic_name(words)]


def test_of_a_folder_only_the_data_is_taken(dropped: Dropped) -> None:
    files = dropped(
        ("a.txt", "A"),
        ("B.JSONL", ""),
        ("README.md", "about"),
        (".hidden.txt", "no"),
        ("c.parquet", "PAR1"),
        ("LICENSE.txt", "so"),
    )
    assert [Path(file).name for file in texts_among(files)] == ["a.txt", "B.JSONL"]
    assert left_out_of(files) == {
        "README.md": "about the data", ".hidden.txt": "hidden", "c.parquet": "a Parquet file", "LICENSE.txt": "about the data",
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        texts_among(files[2:])
    assert plain(caught.value) == snapshot(
        "There is no text in this folder. It holds README.md, .hidden.txt, c.parquet.\n"
        "Give one with .txt, .md, .jsonl files."
    )
