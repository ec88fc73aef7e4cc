"""A run's report: one HTML file without scripts or outside resources."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from markupsafe import Markup

from lowmem_rmu.config.paths import without_places
from lowmem_rmu.evaluation.compare import Row, TextRow, asked_how
from lowmem_rmu.evaluation.statistics import LUCK, NOISE
from lowmem_rmu.evaluation.summary import Headline, bounds_in_words, known_in_words, read_audit, read_summary
from lowmem_rmu.report.charts import (
    ACTIVATIONS,
    DIVERGENCES,
    LOSSES,
    MEMBERS_IN_CHART,
    RELEARNING,
    Curves,
    count_sinks,
    draw_bars,
    draw_charts,
    draw_curves,
    draw_relearning,
    topic_names,
)
from lowmem_rmu.report.rows import PairOfRows, by_role, question_count
from lowmem_rmu.runs.files import write_atomically
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import differences

Shown = TypeVar("Shown", Row, PairOfRows)


def write_report(run: RunFolder) -> Path:
    """Read a finished run folder and write its `report.html`; the same folder always gives the same bytes.

    Raises UserError where the run has no `summary.json` yet.
    """
    target = run.path / "report.html"
    write_atomically(target, _render("report.html.jinja", _content(run)))
    return target


def render_parts(run: RunFolder) -> str:
    """Verdict, charts, tables and answers as HTML to stand in a page of the app, which has `app_stylesheet`.

    Raises UserError where the run has no results, or they cannot be read.
    """
    return _render("report_fragment.html.jinja", _content(run))


def render_audit(run: RunFolder) -> str:
    """Render what attacks on a run found as HTML for the same page; empty where it was not audited. Raises
    UserError where that cannot be read.
    """
    content = _audit_content(run)
    return _render("report_audit.html.jinja", content) if content["audit"] else ""


def render_comparison(first: RunFolder, second: RunFolder) -> str:
    """Two runs side by side, as HTML for the same page: verdicts, differing settings, and every task. Raises
    UserError as `render_parts` does.
    """
    summaries, settings = (
        [read_summary(run) for run in (first, second)],
        [run.config["settings"] for run in (first, second)],
    )
    headline, members = _split(_pairs(*(summary.rows for summary in summaries)))
    content = {
        "names": [first.path.name, second.path.name],
        "summaries": summaries,
        "headlines": [
            Headline.of(run, each.verdict) for run, each in zip((first, second), summaries, strict=True)
        ],
        "settings": [
            (path, [_setting(each, path) for each in settings]) for path in sorted(differences(*settings))
        ],
        "headline": headline,
        "members": members,
    }
    return _render("report_comparison.html.jinja", content)


def app_stylesheet() -> str:
    """Return the look of `render_parts` and `render_comparison` in the app, light and dark; it touches
    nothing else there.
    """
    return str(_environment().get_template("report_style.css.jinja").module.in_app())  # type: ignore[attr-defined]


def _render(template: str, content: dict[str, Any]) -> str:
    return _environment().get_template(template).render(content)


def _content(run: RunFolder) -> dict[str, Any]:
    """Return what the templates show of a run."""
    summary, config, metrics, audit = read_summary(run), run.config, run.read_metrics(), _audit_content(run)
    rows = summary.rows
    headline, members = _split(rows)
    charted = rows if len(members) <= MEMBERS_IN_CHART else headline
    charts = {}
    if charted:
        charts["accuracy"] = draw_charts("accuracy", lambda width: draw_bars(charted, width))
    if metrics:
        charts["losses"] = draw_charts("losses", lambda width: draw_curves(metrics, LOSSES, width))
        charts["activations"] = draw_charts(
            "activations", lambda width: draw_curves(metrics, ACTIVATIONS, width, same_scale=True)
        )
    checks = []
    for row in metrics:
        if any(getattr(row, key) is not None for key in DIVERGENCES):
            checks.append(replace(row, topic=""))
    measured = {}
    for key, words in DIVERGENCES.items():
        if any(getattr(row, key) is not None for row in checks):
            measured[key] = words
    if checks:
        charts["divergence"] = draw_charts("divergence", lambda width: draw_curves(checks, measured, width))
    return {
        "run": run.path.name,
        "config": config,
        "summary": summary,
        "checks": checks,
        "in_nats": "retain_kl" in measured,
        "sinks": count_sinks(metrics, config),
        "created": datetime.fromisoformat(config["created"]),
        "settings": yaml.safe_dump(
            without_places(config["settings"]), sort_keys=False, allow_unicode=True, width=100
        ),
        "metrics": metrics,
        "topics_trained": topic_names(metrics),
        "verdict_line": Headline.of(run, summary.verdict),
        "headline": headline,
        "members": members,
        **audit,
        "charts": charts | audit["charts"],
    }


def _audit_content(run: RunFolder) -> dict[str, Any]:
    """Return what the templates show of an audit; None where there was none."""
    audit = read_audit(run)
    if audit is None:
        return {"audit": None, "texts_relearned": [], "charts": {}}
    curves: dict[str, Curves] = {}
    for result in audit.attacks:
        if result.attack == RELEARNING:
            curves = result.details.get("curves", {})
    charts = (
        {RELEARNING: draw_charts(RELEARNING, lambda width: draw_relearning(audit, curves, width))}
        if curves
        else {}
    )
    return {"audit": audit, "texts_relearned": list(curves), "charts": charts}


def _split(rows: list[Shown]) -> tuple[list[Shown], list[Shown]]:
    """Separate the rows that stand alone from the members of groups."""
    members = [row for row in rows if row.group is not None and not row.is_group]
    return [row for row in rows if row not in members], members


def _pairs(first: list[Row], second: list[Row]) -> list[PairOfRows]:
    """Pair the rows of two runs task by task."""
    by_task = [{(row.group, row.task): row for row in rows} for rows in (first, second)]
    pairs = []
    for key, row in (by_task[1] | by_task[0]).items():
        sides = [rows.get(key) for rows in by_task]
        notes = _notes_of_both(sides)
        pairs.append(PairOfRows(row.task, row.group, row.is_group, row.is_average, row.role, sides, notes))
    return pairs


def _notes_of_both(sides: list[Row | None]) -> str:
    """Two numbers must not be read against each other without how each came about, where that differs."""
    notes = list(dict.fromkeys(_notes(row, with_sample=True) for row in sides if row))
    return (
        notes[0]
        if len(notes) == 1
        else "; ".join(
            f"{each or '0-shot'} ({place})" for each, place in zip(notes, ("first", "second"), strict=True)
        )
    )


def _setting(settings: Any, path: str) -> str:
    """Return the value at a path that `differences` gave, as it is written in YAML; a dash where there is
    none.
    """
    for key, value in settings.items():
        if path == key:
            return (
                yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
                .removesuffix("...\n")
                .strip()
            )
        if path.startswith(f"{key}.") and isinstance(value, dict):
            return _setting(value, path.removeprefix(f"{key}."))
    return "–"


def _environment() -> jinja2.Environment:
    """Autoescape is on whatever the file is called: titles, names and answers are other people's text."""
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": _or_dash("{:.1%}".format),
        "points": _or_dash(lambda share: f"{100 * share:.1f}"),
        "signed_points": _or_dash(lambda share: f"{100 * share:+.1f}"),
        "whole_percent": _or_dash("{:.0%}".format),
        "count": _or_dash("{:,}".format),
        "p_value": _or_dash(_p_value),
        "letters": _letters,
        "questions": question_count,
        "bounds": lambda best: bounds_in_words(best).replace("-", "−"),
        "known": known_in_words,
        "notes": _notes,
        "nats": _or_dash("{:.3f}".format),
        "signed_nats": _or_dash("{:+.3f}".format),
        "perplexity": _or_dash(_perplexity),
        "gigabytes": _or_dash(lambda size: f"{size / 1e9:.2f} GB"),
        "duration": _duration,
        "by_role": by_role,
        "above_noise": _above_noise,
        "in_words": _in_words,
    }
    return environment


def _or_dash(text: Callable[[float], str]) -> Callable[[float | None], str]:
    """Return the same for numbers, with real minus signs; a dash for None: it was not measured."""
    return lambda value: "–" if value is None else text(value).replace("-", "−")


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))  # e^710 is beyond a float
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _above_noise(row: Row | TextRow) -> str:
    """Right answers are tested question by question; the loss on a text has its standard error only."""
    if row.change is None:
        return "–"
    if isinstance(row, Row):
        is_above = row.p_value is not None and row.p_value < LUCK
    else:
        is_above = row.change_stderr is not None and abs(row.change) > NOISE * row.change_stderr
    return "yes" if is_above else "no"


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _letters(shares: list[float] | None) -> str:
    """Return in words how often A, B, C and D were answered, in percent."""
    return "–" if shares is None else " · ".join(f"{100 * share:.0f}" for share in shares)


def _notes(row: Row, with_sample: bool = False) -> str:
    """Return how a task was asked, which its numbers must not be read without; its subjects were asked the
    same way.
    """
    how = asked_how(row.num_fewshot, row.scoring) if row.group is None else ""
    sample = f"{question_count(row)} questions" if with_sample and row.sampled_from else ""
    return ", ".join(filter(None, ("average" if row.is_average else "", how, sample)))


def _in_words(items: list[str]) -> Markup:
    """Join items as `a, b and c`, each escaped and in bold."""
    shown = [Markup("<strong>{}</strong>").format(item) for item in items]
    return Markup(" and ").join([Markup(", ").join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
