import re
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.report.charts import MEMBERS_IN_CHART
from lowmem_rmu.report.html import render_audit, render_parts, write_report
from lowmem_rmu.runs.files import write_json, write_lines
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import AttackResult, Condition
from tests.records import audit_json

HOSTILE = (
    "</dd><script>alert('--> \"1\"')</script><img src=http://evil.example/x onerror=alert(1)> & $\\frac$ ]]>"
)
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


def row(
    task: str,
    role: str,
    base: float,
    unlearned: float | None,
    group: str | None = None,
    is_group: bool = False,
) -> dict[str, Any]:
    measured = unlearned is not None
    return {
        "task": task,
        "group": group,
        "is_group": is_group,
        "role": role,
        "questions": 1264,
        "chance": 0.25,
        "base": base,
        "base_stderr": 0.006,
        "unlearned": unlearned,
        "unlearned_stderr": 0.027 if measured else None,
        "change": unlearned - base if measured else None,
        "change_stderr": 0.03 if measured else None,
        "is_average": False,
        "sampled_from": None,
        "num_fewshot": 0,
        "scoring": "letters",
        "lost": 930 if measured else None,
        "gained": 7 if measured else None,
        "p_value": (0.0 if unlearned < 0.5 else 0.21) if measured else None,
        "base_letters": [0.25, 0.249, 0.251, 0.25],
        "unlearned_letters": [0.02, 0.93, 0.05, 0.0] if measured else None,
        "base_confidence": 0.98,
        "unlearned_confidence": 0.614 if measured else None,
        "base_balanced": 0.985,
        "unlearned_balanced": 0.253 if measured else None,
    }


def summary(members: int = 3) -> dict[str, Any]:
    rows = [
        row("compounds", "forgotten", 0.99, 0.26),
        row("locks_of_doors", "measured", 0.981, 0.9405),
        row("subjects", "kept", 0.9, 0.88, is_group=True),
    ]
    rows += [
        row(f"subject_{n}", "adjacent" if n == 0 else "kept", 0.9, 0.91, group="subjects")
        for n in range(members)
    ]
    text = {
        "name": "cyclones",
        "role": "forgotten",
        "tokens": 3000,
        "base": 4.0,
        "base_stderr": 0.02,
        "unlearned": 6.5,
        "unlearned_stderr": 0.03,
        "change": 2.5,
        "change_stderr": 0.02,
        "base_bits_per_byte": 1.4,
        "unlearned_bits_per_byte": 2.275,
        "kl": None,
        "kl_stderr": None,
    }
    return {
        "preset": "tiny",
        "title": f"Forget it {HOSTILE}",
        "model": "owner/model",
        "verdict": {
            "forgotten": "yes",
            "kept": "partly",
            "sentences": ["compounds: gone.", f"Rest: {HOSTILE}"],
        },
        "rows": rows,
        "texts": [text, {**text, "name": "retain", "role": "kept", "kl": 0.0312, "kl_stderr": 0.0021}],
        "samples": [{"prompt": f"What? {HOSTILE}", "base": "It is amber.", "unlearned": HOSTILE}],
        "stages": [
            {"stage": "evaluate-base", "seconds": 5.14, "peak_memory_bytes": 900_000_000},
            {"stage": "unlearn", "seconds": 3723.0, "peak_memory_bytes": None},
        ],
        "limit": None,
    }


def steps(count: int) -> list[dict[str, Any]]:
    def step(n: int) -> dict[str, Any]:
        values = {
            "loss": 2.0 / n,
            "forget_loss": 2.0 / n,
            "retain_loss": 0.001 * (n - 1),
            "forget_norm": 6.0 + n,
            "retain_norm": 6.0,
        }
        return {
            "step": n,
            "topic": ("compounds", HOSTILE)[n % 2],
            **values,
            "forget_cosine": 1 / n,
            "retain_cosine": 0.99,
        }

    return [step(n) for n in range(1, count + 1)]


def averages() -> list[dict[str, Any]]:
    """A task whose questions are sampled, with an average over its subjects, and one over tasks."""
    sampled = {"sampled_from": 14042, "questions": 100, "num_fewshot": 5}
    whole = row("mmlu", "kept", 0.6, 0.59, is_group=True) | sampled
    stem = row("mmlu_stem", "kept", 0.5, 0.49, "mmlu", is_group=True) | sampled | {"is_average": True}
    over_tasks = row("wmdp", "measured", 0.5, 0.3, is_group=True) | {"is_average": True}
    return [whole, stem, row("mmlu_law", "kept", 0.5, 0.49, "mmlu") | sampled, over_tasks]


def make_run(folder: Path, content: dict[str, Any], metrics: list[dict[str, Any]] | None) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    settings = {"topics": {"compounds": {"alpha": 100.0}, HOSTILE: {}}, "evaluation": {"max_new_tokens": 64}}
    device = {
        "device": "cpu",
        "device_name": "AMD EPYC",
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "seed": 7,
    }
    config = {
        "preset": "tiny",
        "settings": settings,
        **device,
        "model_revision": None,
        "created": "2026-11-21T03:00:00+00:00",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", content)
    if metrics is not None:
        write_lines(run.metrics, metrics)
    return run


def report(
    folder: Path, content: dict[str, Any], metrics: list[dict[str, Any]] | None = None
) -> tuple[Page, str]:
    html = write_report(make_run(folder, content, metrics)).read_text(encoding="utf-8")
    return Page(html), html


def sentences(page: Page) -> list[str]:
    """The text of paragraphs, captions and remarks, cut at tags."""
    return [
        " ".join(data.split())
        for path, data in page.texts
        if {"p", "figcaption", "small"} & set(path.split("/")) and data.strip()
    ]


def only_in(page: Page, other: Page) -> list[str]:
    """The sentences that the other page does not have."""
    return [sentence for sentence in sentences(page) if sentence not in sentences(other)]


def text_with(page: Page, key: str) -> str:
    """The one text that holds the key."""
    [text] = {" ".join(data.split()) for _, data in page.texts if key in data}
    return text


def folded_titles(page: Page) -> list[str]:
    return [data for path, data in page.texts if path.endswith("/summary")]


def test_page_has_everything_in_order(tmp_path: Path) -> None:
    page, html = report(tmp_path, summary(), steps(20))
    title, *headings = [data for path, data in page.texts if path.endswith(("/h1", "/h2"))]
    assert title == f"Forget it {HOSTILE}"
    assert headings == snapshot(
        [
            "Questions, base and unlearned",
            "Reading unseen text",
            "The same prompt to both",
            "How training went",
            "Time and memory",
            "What this does not show",
            "To repeat this run",
        ]
    )
    assert "21 November 2026, 03:00 UTC" in html
    answers = [data for path, data in page.texts if path.endswith("section/dl/div/dd")]
    assert answers == snapshot(["Yes, not audited", "Partly", "Not audited"])
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 * 2  # each chart for wide and for narrow windows
    assert "alpha: 100.0" in page.text_within("pre")


def test_tables_hold_the_numbers_of_the_summary(tmp_path: Path) -> None:
    page, _ = report(tmp_path, summary(), steps(4))
    accuracy, answers = page.rows_of("compounds")
    assert accuracy == ["compounds", "99.0% ± 0.6", "26.0% ± 2.7", "−73.0 ± 3.0", "yes p < 0.001", "1,264"]
    assert answers == [
        "compounds",
        "930",
        "7",
        "25 · 25 · 25 · 25",
        "2 · 93 · 5 · 0",
        "98.5% → 25.3%",
        "98% → 61%",
    ]
    assert page.rows_of("locks_of_doors")[0] == [
        "locks_of_doors",
        "98.1% ± 0.6",
        "94.0% ± 2.7",
        "−4.0 ± 3.0",
        "no p = 0.210",
        "1,264",
    ]
    cyclones = [
        "4.000 ± 0.020",
        "6.500 ± 0.030",
        "+2.500 ± 0.020",
        "yes",
        "54.6 → 665.1",
        "1.400 → 2.275",
        "–",
    ]
    assert page.rows_of("cyclones3,000 tokens")[0][1:] == cyclones
    assert page.rows_of("retain3,000 tokens")[0][-1] == "0.031 ± 0.002"
    assert page.rows_of("evaluate-base") == [["evaluate-base", "5.1 s", "0.90 GB"]]
    assert page.rows_of("unlearn") == [["unlearn", "1 h 02 min", "–"]]
    assert page.rows_of("seed") == [["seed", "7"]]


def test_members_of_groups_are_folded(tmp_path: Path) -> None:
    page, html = report(tmp_path, summary(members=57))
    assert len([cells for cells in page.cells if cells[0].startswith("subject_")]) == 2 * 57
    assert [title for title in folded_titles(page) if "57" in title] == snapshot(
        ["All 57 parts of subjects, one by one"]
    )
    parts, answers = re.findall("<details.*?</details>", html, re.DOTALL)[:2]
    assert "compounds" not in parts
    assert "compounds" in answers


def test_letters_and_confidence_are_folded(tmp_path: Path) -> None:
    page, _ = report(tmp_path, summary())
    for figure in ("93 · 5", "→ 25.3%"):
        shown = [path for path, data in page.texts if figure in data]
        assert shown
        assert all("details" in path.split("/") for path in shown)


def test_averages_are_told_with_the_tasks_and_not_among_their_parts(tmp_path: Path) -> None:
    page, _ = report(tmp_path, {**summary(), "rows": averages(), "limit": 100})
    assert [title for title in folded_titles(page) if "mmlu" in title] == snapshot(
        ["All 1 parts of mmlu, one by one"]
    )
    assert [cells[0] for cells in page.cells if "mmlu_stem" in cells[0] or "wmdp" in cells[0]] == snapshot(
        ["mmlu_stemaverage", "wmdpaverage", "mmlu_stemaverage, 100 of 14,042 questions", "wmdpaverage"]
    )
    assert "mmlu_stem" in page.text_within("svg")


def test_the_way_of_asking_is_told_of_a_task_where_it_is_unusual(tmp_path: Path) -> None:
    page, _ = report(tmp_path, {**summary(), "rows": averages(), "limit": 100})
    assert [cells[0] for cells in page.cells if "shot" in cells[0]] == [
        "mmlu5-shot",
        "mmlu5-shot, 100 of 14,042 questions",
    ]


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
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
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


def test_a_sample_is_told_wherever_its_numbers_are(tmp_path: Path) -> None:
    page, html = report(tmp_path, {**summary(), "rows": averages(), "limit": 100})
    assert (
        html.count("limit: 100")
        == sum(attributes.get("class") == "accuracy" for _, attributes in page.tags)
        == 2
    )
    sampled = [cells for cells in page.cells if cells[0].startswith("mmlu")]
    assert len(sampled) == 6
    assert all("100 of 14,042" in " ".join(cells) for cells in sampled)
    # Three rows, each chart for wide and for narrow windows.
    assert page.text_within("svg").count("100 of 14,042") == 3 * 2


def test_nothing_is_said_of_a_limit_that_left_nothing_out(tmp_path: Path) -> None:
    page, html = report(tmp_path, {**summary(), "limit": 5000})
    assert "limit:" not in html
    assert " of 1,264" not in html
    assert "1,264" not in page.text_within("svg")


def test_base_alone(tmp_path: Path) -> None:
    content = summary()
    content["rows"] = [row("compounds", "forgotten", 0.99, None)]
    unmeasured = dict.fromkeys(
        ["unlearned", "unlearned_stderr", "change", "change_stderr", "unlearned_bits_per_byte"]
    )
    content["texts"] = [content["texts"][0] | unmeasured]
    content["samples"][0]["unlearned"] = None
    content["verdict"] = {"forgotten": "unknown", "kept": "unknown", "sentences": []}
    page, _ = report(tmp_path / "base/run", content)
    accuracy, answers = page.rows_of("compounds")
    assert accuracy == ["compounds", "99.0% ± 0.6", "–", "–", "–", "1,264"]
    assert answers == ["compounds", "–", "–", "25 · 25 · 25 · 25", "–", "98.5% → –", "98% → –"]
    assert page.rows_of("cyclones3,000 tokens")[0][2:] == ["–", "–", "–", "54.6 → –", "1.400 → –", "–"]
    assert [data for path, data in page.texts if path.endswith("section/dl/div/dd")] == snapshot(
        ["Not known", "Not known", "Not audited"]
    )
    whole, _ = report(tmp_path / "whole/run", summary())
    assert only_in(page, whole) == snapshot(
        ["The unlearned model was not measured in this run.", "not asked in this run"]
    )


@pytest.mark.parametrize("metrics", [None, []])
def test_without_training_and_questions(tmp_path: Path, metrics: list[dict[str, Any]] | None) -> None:
    page, _ = report(
        tmp_path / "empty/run", {**summary(), "rows": [], "texts": [], "samples": [], "stages": []}, metrics
    )
    assert "svg" not in {tag for tag, _ in page.tags}
    whole, _ = report(tmp_path / "whole/run", summary(), steps(4))
    assert only_in(page, whole) == snapshot(
        [
            "was measured; what it was to forget is",
            ". No training is recorded in this run. It ran on AMD EPYC (cpu) on 21 November 2026, 03:00 UTC.",
            "No multiple-choice questions were asked in this run.",
        ]
    )


def test_diverged_and_partial_metrics(tmp_path: Path) -> None:
    metrics = steps(3)
    metrics[1] |= {"forget_loss": float("nan"), "retain_loss": float("inf")}
    del metrics[2]["forget_norm"]
    page, _ = report(tmp_path, summary(), metrics)
    assert "Forget loss" in page.text_within("svg")


def test_what_the_guard_saw_is_drawn(tmp_path: Path) -> None:
    metrics = steps(6)
    without, _ = report(tmp_path / "without/run", summary(), metrics)
    for row in metrics[1::2]:
        row |= {
            "retain_kl": 0.1,
            "question_kl": None,
            "topic_kl": 2.0,
            "topic_question_kl": None,
            "letters": "",
        }
    run = make_run(tmp_path / "with/run", summary(), metrics)
    config = run.config
    config["settings"]["rmu"] = {"guard_limit": 0.25, "sinks": "masked"}
    write_json(run.path / "config.json", config)
    html = write_report(run).read_text(encoding="utf-8")
    assert only_in(Page(html), without) == snapshot(
        [
            (
                "Every few steps a guard compared the model with base on text and questions that training does "
                "not see: text and questions to keep should stay near zero, the topic should move away."
            ),
            (
                "Divergence of the unlearned model’s predictions from base, KL(base, unlearned) in nats per "
                "token. The limit for text and questions to keep is 0.25."
            ),
        ]
    )
    assert "Text to keep" in html


def test_notes_on_the_training_are_told(tmp_path: Path) -> None:
    page, _ = report(
        tmp_path, {**summary(), "notes": [f"The weights after step 3 are kept {HOSTILE}"]}, steps(4)
    )
    assert any("The weights after step 3 are kept" in data for _, data in page.texts)


def test_attention_sinks_are_counted(tmp_path: Path) -> None:
    metrics = [step | {"sinks": 8, "tokens": 1000} for step in steps(4)]
    some, _ = report(tmp_path / "some/run", summary(), metrics)
    none, _ = report(tmp_path / "none/run", summary(), steps(4))
    assert only_in(some, none) == snapshot(
        [
            (
                "32 of the 4,000 positions were attention sinks: their signal is many times as large as the rest "
                "of their text’s, and the model relies on it."
            ),
        ]
    )


def test_wide_ranges_of_loss_are_logarithmic(tmp_path: Path) -> None:
    def ticks(last: float) -> list[str]:
        metrics = [
            {**step, "forget_loss": last if step["step"] == 20 else 1.0, "retain_loss": 0.0}
            for step in steps(20)
        ]
        return [
            data
            for path, data in report(tmp_path, summary(), metrics)[0].texts
            if path.endswith("svg/g/g/g/g/g/text")
        ]

    assert "100" in ticks(1000.0)
    assert "1000" in ticks(1000.0)
    assert "100" not in ticks(10.0)


def test_unfinished_run_is_an_error_to_act_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary(), None)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UserError, match="--resume"):
        write_report(run)


def audited(are_questions: bool = True) -> dict[str, Any]:
    """An audit with every state of an attack, and one control."""
    best, unclear = (
        Condition("unseen text, 25 steps", 0.9, 0.886, 0.8, 0.97),
        Condition(f"as {HOSTILE}", 0.5, -0.04, None, None),
    )
    curves = {
        text: {"unlearned": {"5": 0.5, "25": 0.9}, "base": {"25": 0.95}} for text in ("unseen text", HOSTILE)
    }
    done: dict[str, Any] = {
        "state": "done",
        "foretold_seconds": 30.0,
        "seconds": 61.0,
        "peak_memory_bytes": 900_000_000,
    }
    results = [
        AttackResult(
            "relearning",
            "does it come back?",
            **done,
            best=best,
            finding="brought back",
            conditions=(best,),
            details={"curves": curves},
        ),
        AttackResult(
            "wording",
            "is it the words?",
            **done,
            best=unclear,
            finding="inconclusive",
            conditions=(unclear,),
            sentences=(HOSTILE,),
        ),
        AttackResult("harm", "what else changed?", **done, sentences=("Next to nothing.",)),
        AttackResult(
            "suffix",
            "do odd words do it?",
            "not run",
            "it would take about 3.0 min, and 0 s of the budget are left",
        ),
    ]
    audit = audit_json("mine", 60, are_questions, 1.0, 0.3, results)
    known = {
        "name": "refuses",
        "about": "It was taught to refuse.",
        "mark": "hidden",
        "attacks": {"relearning": asdict(best)},
    }
    return audit | {"controls": [known]}


def audited_report(folder: Path, audit: dict[str, Any]) -> tuple[Page, str]:
    write_json(folder / "audit.json", audit)
    return report(folder, summary(), steps(4))


def test_an_audit_is_told_beside_models_of_which_the_truth_is_known(tmp_path: Path) -> None:
    page, html = audited_report(tmp_path, audited())
    without, _ = report(tmp_path / "without" / tmp_path.name, summary(), steps(4))
    assert [sentence for sentence in only_in(page, without) if "60" in sentence] == snapshot(
        [
            (
                "What a model no longer answers may be gone, or only hidden. So the unlearned model was "
                "attacked, and each attack’s model was measured on the same 60 questions about what was "
                "forgotten: how much of what was lost does it bring back?"
            ),
        ]
    )
    headings = [data for path, data in page.texts if path.endswith("/h2")]
    assert headings[2:4] == snapshot(["Gone, or only hidden?", "The same prompt to both"])
    assert [data for path, data in page.texts if path.endswith("section/dl/div/dd")] == snapshot(
        ["Only hidden", "Partly", "Hidden"]
    )
    assert [data for path, data in page.texts if path.endswith("section/div/dl/div/dd")] == snapshot(
        ["Hidden"]
    )
    assert page.rows_of("relearningdoes it come back?brought back") == [
        ["relearningdoes it come back?brought back", "100.0", "30.0", "90.0", "89% 80 to 97", "brought back"]
    ]
    assert page.rows_of("wordingis it the words?inconclusive")[0][3:] == [
        "50.0",
        "−4% any share",
        "inconclusive",
    ]
    assert page.rows_of("suffixdo odd words do it?")[0][1] == snapshot(
        "not run: it would take about 3.0 min, and 0 s of the budget are left"
    )
    assert page.rows_of("harmwhat else changed?")[0][1] == snapshot(
        "asks something else than what comes back; see below"
    )
    assert page.rows_of("relearning") == [["relearning", "89% 80 to 97", "89% 80 to 97"]]
    assert page.rows_of("wording") == [["wording", "−4% any share", "–"]]
    assert page.rows_of("Verdict") == [["Verdict", "hidden", "hidden"]]
    assert "It was taught to refuse." in html
    assert text_with(page, "(unseen text, 25 steps)") == snapshot(
        "relearning: brought back 89% (80 to 97) of what was lost (unseen text, 25 steps)."
    )


def test_the_ways_of_an_attack_are_folded_and_its_text_stays_text(tmp_path: Path) -> None:
    page, html = audited_report(tmp_path, audited())
    folded = page.text_within("details")
    assert "Next to nothing." in folded
    assert page.rows_of("unseen text, 25 steps") == [["unseen text, 25 steps", "90.0", "89% 80 to 97"]]
    took = text_with(page, "1 min 01 s")
    assert took == snapshot("It took 1 min 01 s (estimate: 30.0 s) and 0.90 GB at its peak.")
    assert took in " ".join(folded.split())
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "were not tried" not in html


@pytest.mark.parametrize(("are_questions", "title"), [(True, "Accuracy"), (False, "Loss in nats/token")])
def test_relearning_is_drawn_from_no_step_on(tmp_path: Path, are_questions: bool, title: str) -> None:
    audit = audited(are_questions)
    page, html = audited_report(tmp_path, audit)
    drawn = sum(tag == "svg" for tag, _ in page.tags)
    assert title in page.text_within("svg")
    audit["attacks"][0]["details"] = {}
    assert sum(tag == "svg" for tag, _ in audited_report(tmp_path, audit)[0].tags) == drawn - 2, (
        "for wide and for narrow windows"
    )


def test_the_page_of_the_app_has_the_same_section(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary(), steps(4))
    assert render_audit(run) == ""
    before = render_parts(run)
    write_json(run.audit_result, audited())
    section = Page(render_audit(run))
    assert section.tags[0] == ("div", {"class": "rmu-results"})
    [heading] = [data for path, data in section.texts if path.endswith("/h2")]
    assert heading in render_parts(run)
    assert heading not in before
    assert (
        section.rows_of("Verdict")
        == Page(render_parts(run)).rows_of("Verdict")
        == [["Verdict", "hidden", "hidden"]]
    )
