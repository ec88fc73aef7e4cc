import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowmem_rmu.errors import UserError
from lowmem_rmu.report import MEMBERS_IN_CHART, write_report
from lowmem_rmu.runs import RunFolder, write_json, write_lines

HOSTILE = "</dd><script>alert('--> \"1\"')</script><img src=http://evil.example/x onerror=alert(1)> & $\\frac$ ]]>"
VOID = {"meta", "wbr", "br", "img", "link"}


class Page(HTMLParser):
    """What a browser would make of the page; complains about tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        """Each piece of text with the path of tags to it."""
        self.cells: list[list[str]] = []
        """Rows of all tables."""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(("/".join(self._open), data))
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def rows_of(self, task: str) -> list[list[str]]:
        return [row for row in self.cells if row and row[0] == task]

    def text_within(self, tag: str) -> str:
        return " ".join(data for path, data in self.texts if tag in path.split("/"))


def row(task: str, role: str, base: float, unlearned: float | None, group: str | None = None, is_group: bool = False) -> dict[str, Any]:
    measured = unlearned is not None
    return {
        "task": task, "group": group, "is_group": is_group, "role": role, "questions": 1264, "chance": 0.25,
        "base": base, "base_stderr": 0.006, "unlearned": unlearned, "unlearned_stderr": 0.027 if measured else None,
        "change": unlearned - base if measured else None, "change_stderr": 0.03 if measured else None,
    }  # fmt: skip


def summary(members: int = 3) -> dict[str, Any]:
    rows = [
        row("compounds", "forgotten", 0.99, 0.26),
        row("locks_of_doors", "measured", 0.981, 0.9405),
        row("subjects", "kept", 0.9, 0.88, is_group=True),
    ]
    rows += [row(f"subject_{n}", "adjacent" if n == 0 else "kept", 0.9, 0.91, group="subjects") for n in range(members)]
    text = {"name": "cyclones", "role": "forgotten", "tokens": 3000, "base": 4.0, "base_stderr": 0.02, "unlearned": 6.5}
    return {
        "preset": "tiny",
        "title": f"Forget it {HOSTILE}",
        "model": "owner/model",
        "verdict": {"forgotten": "yes", "kept": "partly", "sentences": ["compounds: gone.", f"Rest: {HOSTILE}"]},
        "rows": rows,
        "texts": [{**text, "unlearned_stderr": 0.03, "change": 2.5, "change_stderr": 0.02}],
        "samples": [{"prompt": f"What? {HOSTILE}", "base": "It is amber.", "unlearned": HOSTILE}],
        "stages": [
            {"stage": "evaluate-base", "seconds": 5.14, "peak_memory_bytes": 900_000_000},
            {"stage": "unlearn", "seconds": 3723.0, "peak_memory_bytes": None},
        ],
        "limit": None,
    }


def steps(count: int) -> list[dict[str, Any]]:
    def step(n: int) -> dict[str, Any]:
        values = {"loss": 2.0 / n, "forget_loss": 2.0 / n, "retain_loss": 0.001 * (n - 1), "forget_norm": 6.0 + n, "retain_norm": 6.0}
        return {"step": n, "topic": ("compounds", HOSTILE)[n % 2], **values, "forget_cosine": 1 / n, "retain_cosine": 0.99}

    return [step(n) for n in range(1, count + 1)]


def make_run(folder: Path, content: dict[str, Any], metrics: list[dict[str, Any]] | None) -> RunFolder:
    run = RunFolder(folder)
    settings = {"topics": {"compounds": {"alpha": 100.0}, HOSTILE: {}}, "evaluation": {"max_new_tokens": 64}}
    device = {"device": "cpu", "device_name": "AMD EPYC", "versions": {"python": "3.11.7", "torch": "2.11.0"}, "seed": 7}
    config = {"preset": "tiny", "settings": settings, **device, "model_revision": None, "created": "2026-11-21T03:00:00+00:00"}
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", content)
    if metrics is not None:
        write_lines(run.metrics, metrics)
    return run


def report(folder: Path, content: dict[str, Any], metrics: list[dict[str, Any]] | None = None) -> tuple[Page, str]:
    html = write_report(make_run(folder, content, metrics)).read_text(encoding="utf-8")
    return Page(html), html


def test_page_has_everything_in_order(tmp_path: Path) -> None:
    page, html = report(tmp_path, summary(), steps(20))
    headings = [data for path, data in page.texts if path.endswith(("/h1", "/h2"))]
    assert headings == [
        f"Forget it {HOSTILE}", "Questions, base and unlearned", "Reading unseen text", "The same prompt to both", "How training went",
        "Time and memory", "What this does not show", "To repeat this run",
    ]  # fmt: skip
    assert "21 November 2026, 03:00 UTC" in html
    answers = [data for path, data in page.texts if path.endswith("section/dl/div/dd")]
    assert answers == ["Yes", "Partly"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 * 2  # each chart for wide and for narrow windows
    assert "alpha: 100.0" in page.text_within("pre")


def test_tables_hold_the_numbers_of_the_summary(tmp_path: Path) -> None:
    page, _ = report(tmp_path, summary(), steps(4))
    assert page.rows_of("compounds") == [["compounds", "99.0% ± 0.6", "26.0% ± 2.7", "−73.0 ± 3.0", "yes", "1,264"]]
    assert page.rows_of("locks_of_doors") == [["locks_of_doors", "98.1% ± 0.6", "94.0% ± 2.7", "−4.0 ± 3.0", "no", "1,264"]]
    assert page.rows_of("cyclones3,000 tokens")[0][1:] == ["4.000 ± 0.020", "6.500 ± 0.030", "+2.500 ± 0.020", "yes", "54.6 → 665.1"]
    assert page.rows_of("evaluate-base") == [["evaluate-base", "5.1 s", "0.90 GB"]]
    assert page.rows_of("unlearn") == [["unlearn", "1 h 02 min", "–"]]
    assert page.rows_of("seed") == [["seed", "7"]]


def test_members_of_groups_are_folded(tmp_path: Path) -> None:
    page, _ = report(tmp_path, summary(members=57))
    assert len([cells for cells in page.cells if cells[0].startswith("subject_")]) == 57
    folded = page.text_within("details")
    assert "All 57 parts of subjects" in folded
    assert "compounds" not in folded.split("Settings")[0]


@pytest.mark.parametrize(("members", "drawn"), [(MEMBERS_IN_CHART, True), (MEMBERS_IN_CHART + 1, False)])
def test_few_members_are_drawn_too(tmp_path: Path, members: int, drawn: bool) -> None:
    chart = report(tmp_path, summary(members))[0].text_within("svg")
    assert "subjects" in chart
    assert "compounds" in chart
    assert ("subject_1" in chart) is drawn


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    content = summary()
    content["rows"][0]["task"] = content["texts"][0]["name"] = content["model"] = HOSTILE
    content["rows"][1]["task"] = "$\\frac$"  # matplotlib would take it for mathematics, and refuse it
    page, _ = report(tmp_path, content, steps(4))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    shown = [path for path, data in page.texts if data == HOSTILE]
    assert any(path.endswith("article/dl/div/dd") for path in shown)
    assert any(path.endswith("ul/li") for path in shown), "the topic in the legend"
    assert "$\\frac$" in page.text_within("svg")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page, html = report(tmp_path, summary(), steps(20))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in html


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page, html = report(tmp_path, summary(), steps(20))
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert ids
    assert max(ids.values()) == 1
    assert set(re.findall(r'(?:url\(#|xlink:href="#)([\w-]+)', html)) <= set(ids)


def test_charts_follow_the_colours_of_the_page(tmp_path: Path) -> None:
    _, html = report(tmp_path, summary(), steps(20))
    assert "fill: var(--base)" in html
    assert "fill: var(--unlearned)" in html
    assert "stroke: var(--topic-0)" in html
    assert "#0a00" not in html
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(re.findall(r"--([\w-]+):", html))


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary(), steps(20))
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_limit_is_said_at_every_accuracy_table(tmp_path: Path) -> None:
    assert "(limit: " not in report(tmp_path, summary())[1]
    page, html = report(tmp_path, {**summary(), "limit": 100})
    assert html.count("(limit: 100)") == sum(attributes.get("class") == "accuracy" for _, attributes in page.tags) == 2


def test_base_alone(tmp_path: Path) -> None:
    content = summary()
    content["rows"] = [row("compounds", "forgotten", 0.99, None)]
    content["texts"] = [{**content["texts"][0], "unlearned": None, "unlearned_stderr": None, "change": None, "change_stderr": None}]
    content["samples"][0]["unlearned"] = None
    content["verdict"] = {"forgotten": "unknown", "kept": "unknown", "sentences": []}
    page, html = report(tmp_path, content)
    assert page.rows_of("compounds") == [["compounds", "99.0% ± 0.6", "–", "–", "–", "1,264"]]
    assert page.rows_of("cyclones3,000 tokens")[0][2:] == ["–", "–", "–", "54.6 → –"]
    assert html.count("Not known") == 2
    assert "not measured in this run" in html
    assert "not asked in this run" in html


@pytest.mark.parametrize("metrics", [None, []])
def test_without_training_and_questions(tmp_path: Path, metrics: list[dict[str, Any]] | None) -> None:
    page, html = report(tmp_path, {**summary(), "rows": [], "texts": [], "samples": [], "stages": []}, metrics)
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "No training is recorded" in html
    assert "No multiple-choice questions" in html


def test_diverged_and_partial_metrics(tmp_path: Path) -> None:
    metrics = steps(3)
    metrics[1] |= {"forget_loss": float("nan"), "retain_loss": float("inf")}
    del metrics[2]["forget_norm"]
    page, _ = report(tmp_path, summary(), metrics)
    assert "Forget loss" in page.text_within("svg")


def test_wide_ranges_of_loss_are_logarithmic(tmp_path: Path) -> None:
    def ticks(last: float) -> list[str]:
        metrics = [{**step, "forget_loss": last if step["step"] == 20 else 1.0, "retain_loss": 0.0} for step in steps(20)]
        return [data for path, data in report(tmp_path, summary(), metrics)[0].texts if path.endswith("svg/g/g/g/g/g/text")]

    assert "100" in ticks(1000.0)
    assert "1000" in ticks(1000.0)
    assert "100" not in ticks(10.0)


def test_unfinished_run_is_an_error_to_act_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary(), None)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UserError, match="--resume"):
        write_report(run)
