"""Presets as this machine sees them, and what may be changed of them from the page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from inline_snapshot import snapshot

from lowmem_rmu.config import loading
from lowmem_rmu.config.loading import load_preset, preset_names
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.estimate import StageNeed, peak_of
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import STAGES
from lowmem_rmu.ui import offers
from lowmem_rmu.ui.guard import on_the_page
from tests.texts import plain

CPU = torch.device("cpu")
HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(1)>"
ELSEWHERE = snapshot(
    "A setting names another model, text or questions: that cannot be done from the page.\n"
    "Drop your own text in above, or put a preset of your own into the folder presets/ and start the app "
    "again."
)


@pytest.fixture
def own_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of presets that holds one whose every word is hostile."""
    settings = load_preset("tiny").model_dump()
    settings["title"] = HOSTILE
    settings["topics"] = {HOSTILE: settings["topics"]["locks"]}
    (tmp_path / "<b>mine.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(loading, "PRESETS_FOLDER", tmp_path)
    offers.offers.cache_clear()
    yield tmp_path
    offers.offers.cache_clear()


def mistake(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        offers.chosen(*arguments)
    return on_the_page(caught.value)


def test_all_presets_are_offered_the_smallest_first() -> None:
    found = offers.offers(CPU)
    assert {offer.name for offer in found} == set(preset_names())
    assert found[0].name == "tiny"
    assert [offer.needed_here for offer in found] == sorted(offer.needed_here for offer in found)
    tiny = found[0]
    assert tiny.topics == ("compounds", "locks")
    assert 1.5e6 < tiny.parameters < 3e6
    assert peak_of([StageNeed("a", 1, 2), StageNeed("b", 1, 1, 7)]) == 9


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (0, snapshot("fits here")),
        (850, snapshot("fits here")),
        (851, snapshot("tight")),
        (1000, snapshot("tight")),
        (1001, snapshot("does not fit")),
    ],
)
def test_whether_a_preset_fits(needed: int, words: str) -> None:
    assert offers.fit(needed, free=1000) == words


def test_why_a_preset_fits_or_not_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        offers.Offer("a", "A", ("x",), 10**6, 900, 900),
        offers.Offer("b", "B", ("x",), 10**9, 900, 900),
    )
    monkeypatch.setattr(offers, "memory_available", lambda device: 1000)
    assert offers.why(small, CPU) == snapshot(
        "It needs 0 MiB; 0 MiB are free in this computer's main memory now. Close other programs first."
    )
    assert offers.why(large, CPU) == snapshot(
        "It needs 0 MiB; 0 MiB are free in this computer's main memory now. Close other programs first. No "
        "NVIDIA GPU was found: on the processor alone this takes many hours, or days."
    )
    assert offers.label(small, CPU) == snapshot("a: A (tight)")
    monkeypatch.setattr(offers, "memory_available", lambda device: 10**6)
    assert offers.why(small, CPU) == snapshot(
        "It needs 0 MiB; 1 MiB are free in this computer's main memory now."
    )


def test_the_table_is_the_same_for_the_page_and_the_api() -> None:
    rows = {row["preset"]: row for row in offers.table(CPU)}
    assert rows.keys() == set(preset_names())
    assert rows["tiny"].keys() == {
        "preset",
        "title",
        "forgets",
        "parameters",
        "gpu_memory_gib",
        "memory_here_gib",
        "fit",
        "why",
    }
    assert rows["zephyr-7b"]["forgets"] == list(load_preset("zephyr-7b").topics)
    assert 3 < rows["zephyr-7b"]["gpu_memory_gib"] < 12
    html = offers.table_html(CPU)
    assert html.count("<tr>") == 1 + len(rows)
    for name in rows:
        assert f"<th scope='row'>{name}</th>" in html
    assert "<td>7.2 B</td>" in html
    assert re.search(r"<td>1\.\d M</td>|<td>2\.\d M</td>", html)


def test_a_preset_of_ones_own_is_shown_to_the_letter(own_presets: Path) -> None:
    html = offers.table_html(CPU)
    assert not re.search(r"<(script|img|b)\b", html)
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in html
    assert "<th scope='row'>&lt;b&gt;mine</th>" in html
    assert [offer.name for offer in offers.offers(CPU)] == ["<b>mine"]


def test_the_plan_has_a_row_a_stage_and_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset("tiny")
    needs = offers.plan(preset, ModelSpec.of_preset(preset), CPU)
    html = offers.plan_html(preset, CPU)
    rows = re.findall(r"<tr><th scope='row'>(.*?)</th>", html)
    assert rows == [need.stage for need in needs]
    assert set(rows) <= set(STAGES)
    assert re.findall("<strong>(.*?)</strong>", html)[0] == offers.fit(1, free=100).capitalize()
    monkeypatch.setattr(offers, "memory_available", lambda device: peak_of(needs) - 1)
    assert f"<strong>{offers.fit(2, free=1).capitalize()}</strong>" in offers.plan_html(preset, CPU)


def test_the_plan_follows_the_settings() -> None:
    small, large = (
        offers.plan_html(offers.chosen("tiny", {"rmu.batch_size": size}), CPU) for size in (2, 64)
    )
    assert small != large


def test_the_plan_shows_nothing_of_what_was_typed(own_presets: Path) -> None:
    preset = offers.chosen(
        "<b>mine", {"title": HOSTILE}, f"evaluation.prompts=['{HOSTILE.replace(chr(39), '')}']"
    )
    assert preset.evaluation.prompts
    html = offers.plan_html(preset, CPU)
    assert set(re.findall(r"<(\w+)", html)) == {
        "p",
        "strong",
        "div",
        "table",
        "thead",
        "th",
        "tbody",
        "tr",
        "td",
    }
    assert "alert" not in html


@pytest.mark.parametrize(
    "name", [None, "", "tyni", "./presets/tiny.yaml", "../presets/tiny", "tiny.yaml", "/etc/passwd"]
)
def test_only_presets_by_name_can_be_chosen(name: str | None) -> None:
    assert mistake(name, {}) == snapshot("Choose one of the presets first.")


def test_fields_and_lines_change_settings() -> None:
    lines = "# a note\n\n  rmu.batch_size=2  \r\nmodel.quantisation=none\n topics.locks.alpha = 7\nevaluation.prompts=['Why?', 'How?']"
    preset = offers.chosen(
        "tiny",
        {"rmu.steps": 4, "rmu.learning_rate": 1e-05, "evaluation.limit": 8, "rmu.max_grad_norm": None},
        lines,
    )
    assert (preset.rmu.steps, preset.rmu.learning_rate, preset.rmu.batch_size, preset.rmu.max_grad_norm) == (
        4,
        1e-05,
        2,
        None,
    )
    assert (preset.evaluation.limit, preset.evaluation.prompts) == (8, ["Why?", "How?"])
    assert (preset.model.quantisation, preset.topics["locks"].alpha) == ("none", 7)
    assert offers.chosen("tiny", {}) == load_preset("tiny")


def test_a_line_goes_before_a_field() -> None:
    assert offers.chosen("tiny", {"rmu.steps": 4}, "rmu.steps=5").rmu.steps == 5


def test_all_mistakes_are_told_at_once_without_the_command_line_s_words() -> None:
    said = mistake("tiny", {"rmu.steps": 0, "rmu.rank": None}, "rmu.stpes=3\ntopics.locks.alpha=-1")
    first, *rest = said.splitlines()
    assert first == snapshot("What was given has 4 mistakes:"), "none of them is in the preset's file"
    assert sorted(rest) == snapshot(
        [
            "  rmu.rank: should be a valid integer (it is None)",
            "  rmu.steps: should be greater than or equal to 1 (it is 0)",
            '  rmu.stpes: unknown key. Did you mean "steps"?',
            "  topics.locks.alpha: should be greater than or equal to 0 (it is -1)",
        ]
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("steps", snapshot('"steps" is not of the form key.path=value, for example rmu.steps=50.')),
        (
            "rmu..steps=3",
            snapshot('"rmu..steps=3" is not of the form key.path=value, for example rmu.steps=50.'),
        ),
        ("rmu.steps=[", snapshot('"rmu.steps=[": the value is not valid YAML.')),
        (
            "rmu.steps=!!python/object/apply:os.system [id]",
            snapshot('"rmu.steps=!!python/object/apply:os.system [id]": the value is not valid YAML.'),
        ),
        ("title.a=3", snapshot('"title.a=3": the preset has no place "title.a".')),
        (
            "retain.corpora.7.source=x",
            snapshot('"retain.corpora.7.source=x": the preset has no place "retain.corpora.7.source".'),
        ),
    ],
)
def test_a_line_that_is_no_setting_is_quoted(line: str, said: str) -> None:
    assert mistake("tiny", {}, line) == said


OTHERS = [
    "model.name=./elsewhere",
    "model.name=owner/name",
    "  model.name = ~/elsewhere",
    "model.revision=main",
    "model={name: owner/name, config: null}",
    "topics.locks.corpus.source=/etc",
    "topics.locks.corpus.source=../lowmem_rmu/tiny/data/forget/compounds.jsonl",
    "topics.locks.corpus={source: /etc}",
    "topics.locks={corpus: {source: /etc}, alpha: 1}",
    "topics={locks: {corpus: {'source': /etc}, alpha: 1}}",
    "topics.more={corpus: {source: /etc}, alpha: 1}",
    "topics.locks.corpus.subset=other",
    "topics.locks.corpus.split=test",
    "retain.corpora.0.source=/etc/passwd",
    "retain.corpora.-1.source=/etc/passwd",
    "retain.corpora=[{source: /etc}]",
    "retain.corpora=[&a {source: /etc}, *a]",
    'retain={"corpora": [{"source": "/etc"}]}',
    "evaluation.tasks.locks.source=/etc/passwd",
    "evaluation.tasks.locks={source: /etc/passwd, role: kept}",
    "evaluation.tasks.wmdp_bio={role: forgotten}",
    "evaluation.tasks.subjects.split=/etc",
    "evaluation.tasks.subjects.split=../held_out",
    "evaluation.tasks.subjects.examples_split=../../..",
    "evaluation.tasks={}",
    "evaluation={tasks: {x: {source: /etc, role: kept}}}",
    "rmu.steps=5\n\n# a note\nmodel.revision=main",
    "rmu.steps=5\x0bmodel.revision=main",
]


@pytest.mark.parametrize("lines", OTHERS)
def test_no_line_reads_anything_else(lines: str) -> None:
    assert mistake("tiny", {}, lines) == ELSEWHERE


@pytest.mark.parametrize("line", [line for line in OTHERS if "\n" not in line and "\x0b" not in line])
def test_no_field_reads_anything_else_either(line: str) -> None:
    path, _, value = line.strip().partition("=")
    assert mistake("tiny", {path: value}) == ELSEWHERE


def test_the_preset_s_own_places_may_be_said_again() -> None:
    own = load_preset("tiny").topics["locks"].corpus.source
    assert offers.chosen("tiny", {}, f"topics.locks.corpus.source={own}\nmodel.revision=null") == load_preset(
        "tiny"
    )


def test_a_mistake_names_the_field_or_the_line_that_it_was_typed_into() -> None:
    labels = {"rmu.steps": "Steps", "rmu.rank": "Rank"}
    with pytest.raises(UserError) as caught:
        offers.chosen("tiny", {"rmu.steps": 0, "rmu.rank": 0}, "rmu.rank=-1\nrmu.batch_size=0", labels)
    first, *rest = on_the_page(caught.value).splitlines()
    assert first == snapshot("What was given has 3 mistakes:")
    assert sorted(rest) == snapshot(
        [
            "  Steps, rmu.steps: should be greater than or equal to 1 (it is 0)",
            "  rmu.batch_size: should be greater than or equal to 1 (it is 0)",
            "  rmu.rank: should be greater than or equal to 1 (it is -1)",
        ]
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rmu.steps=" + "[" * 100_000, snapshot("the value is nested more than 50 levels deep.")),
        ("rmu.steps=" + "9" * 5000, snapshot("the value is a number of more than 100 characters.")),
        ("rmu.steps=&a [*a]", snapshot("the value is recursive: the alias *a stands within its anchor.")),
        (
            "rmu.modules=[&a [x, x], "
            + ", ".join(f"&{chr(97 + n)} [{', '.join([f'*{chr(96 + n)}'] * 9)}]" for n in range(1, 20))
            + "]",
            snapshot("the value is larger than 10,000 values, counting what aliases repeat."),
        ),
        ("rmu" + ".x" * 100_000 + "=1", snapshot("the path has more than 50 keys.")),
    ],
    ids=["depth", "digits", "recursion", "aliases", "path"],
)
def test_a_line_that_would_hang_the_page_is_refused_at_once(line: str, said: str) -> None:
    told = mistake("tiny", {}, line)
    assert plain(told.rpartition('": ')[2]) == said
    assert len(told) < 300
