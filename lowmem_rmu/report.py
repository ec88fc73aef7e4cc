"""One self-contained HTML file about a run: what was done, whether it worked, and what that does not
prove.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from lowmem_rmu.evaluation.compare import asked_how, counted
from lowmem_rmu.evaluation.statistics import LUCK, NOISE
from lowmem_rmu.evaluation.summary import Headline, bounds_in_words, known_in_words, read_audit, read_summary
from lowmem_rmu.presets import differences, without_places
from lowmem_rmu.records import StepRow
from lowmem_rmu.runs import RunFolder, write_atomically

Row = dict[str, Any]

ROLES = {
    "forgotten": "To be forgotten",
    "adjacent": "Close to it, should stay",
    "kept": "Should stay",
    "measured": "Only measured",
}
"""What is expected of a task, as the page says it and in its order."""
SIDES = ("base", "unlearned")
LOSSES = {"forget_loss": "Forget loss", "retain_loss": "Retain loss"}
DIVERGENCES = {
    "retain_kl": "Text to keep",
    "topic_kl": "Topic",
    "retain_shift": "Text to keep",
    "topic_shift": "Topic",
}
"""Nats where the whole model was there to measure, else the shift of the target layer's output."""
ACTIVATIONS = {
    "forget_norm": "Activation norm, forget set",
    "retain_norm": "Activation norm, retain set",
    "forget_cosine": "Cosine with base, forget set",
    "retain_cosine": "Cosine with base, retain set",
}
RELEARNING = "relearning"
"""The attack whose `details` have curves: what is known after so many steps, by text and side."""
MEMBERS_IN_CHART = 12
"""More members of groups than this (MMLU has 57 subjects) are shown in the folded table only."""

# A figure of width / 72 inches has SVG units of a CSS pixel. Narrow windows get a drawing of their own:
# scaled, its text is lost.
WIDTHS = {"wide": 720, "narrow": 344}
# Matplotlib draws in stand-in colours that become CSS variables, so that one drawing suits the light and the
# dark page.
TOPIC_COLOURS = [f"topic-{number}" for number in range(5)]
COLOURS = {
    name: f"#0a00{number:02x}"
    for number, name in enumerate(["ink", "muted", "line", "page", *SIDES, *TOPIC_COLOURS])
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in the name of a task is a dollar
    "text.color": COLOURS["ink"],
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 1,
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


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
    headline, members = _split(_pairs(*(summary["rows"] for summary in summaries)))
    content = {
        "names": [first.path.name, second.path.name],
        "summaries": summaries,
        "headlines": [
            Headline.of(run, each["verdict"]) for run, each in zip((first, second), summaries, strict=True)
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
    rows = summary["rows"]
    headline, members = _split(rows)
    charted = rows if len(members) <= MEMBERS_IN_CHART else headline
    charts = {}
    if charted:
        charts["accuracy"] = _charts("accuracy", lambda width: _bars(charted, width))
    if metrics:
        charts["losses"] = _charts("losses", lambda width: _curves(metrics, LOSSES, width))
        charts["activations"] = _charts(
            "activations", lambda width: _curves(metrics, ACTIVATIONS, width, same_scale=True)
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
        charts["divergence"] = _charts("divergence", lambda width: _curves(checks, measured, width))
    return {
        "run": run.path.name,
        "config": config,
        "summary": summary,
        "checks": checks,
        "in_nats": "retain_kl" in measured,
        "sinks": _sinks(metrics, config),
        "created": datetime.fromisoformat(config["created"]),
        "settings": yaml.safe_dump(
            without_places(config["settings"]), sort_keys=False, allow_unicode=True, width=100
        ),
        "metrics": metrics,
        "topics_trained": _topics(metrics),
        "verdict_line": Headline.of(run, summary["verdict"]),
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
    curves: dict[str, Row] = next(
        (each["details"].get("curves", {}) for each in audit["attacks"] if each["attack"] == RELEARNING), {}
    )
    charts = (
        {RELEARNING: _charts(RELEARNING, lambda width: _relearning(audit, curves, width))} if curves else {}
    )
    return {"audit": audit, "texts_relearned": list(curves), "charts": charts}


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Separate the rows that stand alone from the members of groups."""
    members = [row for row in rows if row["group"] is not None and not row["is_group"]]
    return [row for row in rows if row not in members], members


def _pairs(first: list[Row], second: list[Row]) -> list[Row]:
    """Pair the rows of two runs task by task: `sides` has the row of each, None where a run did not ask
    it.
    """
    by_task = [{(row["group"], row["task"]): row for row in rows} for rows in (first, second)]
    shared = ("task", "group", "is_group", "is_average", "role")
    pairs = []
    for key, row in (by_task[1] | by_task[0]).items():
        sides = [rows.get(key) for rows in by_task]
        pairs.append({name: row[name] for name in shared} | {"sides": sides, "notes": _notes_of_both(sides)})
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
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
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
        "questions": _questions,
        "bounds": lambda best: bounds_in_words(best).replace("-", "−"),
        "known": known_in_words,
        "notes": _notes,
        "nats": _or_dash("{:.3f}".format),
        "signed_nats": _or_dash("{:+.3f}".format),
        "perplexity": _or_dash(_perplexity),
        "gigabytes": _or_dash(lambda size: f"{size / 1e9:.2f} GB"),
        "duration": _duration,
        "by_role": _by_role,
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


def _by_role(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Heading and rows of each role that occurs, in the order of ROLES."""
    groups = [(heading, [row for row in rows if row["role"] == role]) for role, heading in ROLES.items()]
    return [(heading, group) for heading, group in groups if group]


def _above_noise(row: Row) -> str:
    """Right answers are tested question by question; the loss on a text has its standard error only."""
    if row["change"] is None:
        return "–"
    is_above = (
        row["p_value"] < LUCK if "p_value" in row else abs(row["change"]) > NOISE * row["change_stderr"]
    )
    return "yes" if is_above else "no"


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _letters(shares: list[float] | None) -> str:
    """Return in words how often A, B, C and D were answered, in percent."""
    return "–" if shares is None else " · ".join(f"{100 * share:.0f}" for share in shares)


def _questions(row: Row) -> str:
    return counted(row["questions"], row["sampled_from"])


def _notes(row: Row, with_sample: bool = False) -> str:
    """Return how a task was asked, which its numbers must not be read without; its subjects were asked the
    same way.
    """
    how = asked_how(row["num_fewshot"], row["scoring"]) if row["group"] is None else ""
    sample = f"{_questions(row)} questions" if with_sample and row["sampled_from"] else ""
    return ", ".join(filter(None, ("average" if row["is_average"] else "", how, sample)))


def _in_words(items: list[str]) -> Markup:
    """Join items as `a, b and c`, each escaped and in bold."""
    shown = [Markup("<strong>{}</strong>").format(item) for item in items]
    return Markup(" and ").join([Markup(", ").join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _charts(name: str, draw: Callable[[int], Figure]) -> dict[str, Markup]:
    """Draw one chart as inline SVG for each of WIDTHS."""
    return {size: _svg(f"{name}-{size}", draw, width) for size, width in WIDTHS.items()}


def _svg(name: str, draw: Callable[[int], Figure], width: int) -> Markup:
    """Return an `<svg>` to stand in HTML. `name` makes the ids in it differ from those of the page's other
    charts.
    """
    buffer = StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        draw(width).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # an XML declaration and a doctype have no place inside HTML
    # It speaks to the whole page; the stylesheet says the same of charts.
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # "axes_1" and the like, which every chart has and nothing refers to.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return Markup(svg)


def _bars(rows: list[Row], width: int) -> Figure:
    """Accuracy of base and unlearned, a pair of bars a task under the heading of its role."""
    lines: list[Any] = [line for heading, group in _by_role(rows) for line in (heading, *group)]
    figure = Figure(figsize=(width / 72, (36 * len(lines) + 34) / 72), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1.13), ylim=(len(lines) - 0.5, -0.3))
    for y, line in enumerate(lines):
        if isinstance(line, str):
            place: dict[str, Any] = {
                "xycoords": ("figure fraction", "data"),
                "va": "center",
                "in_layout": False,
            }
            axes.annotate(line, (0, y + 0.15), weight="bold", **place)
        else:
            _pair_of_bars(axes, y, line)
    tasks = [(y, _tick(line, width)) for y, line in enumerate(lines) if not isinstance(line, str)]
    axes.set_yticks(*zip(*tasks, strict=True))
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False, axis="y")
    axes.spines.bottom.set_bounds(0, 1)
    return figure


def _tick(row: Row, width: int) -> str:
    """Return a task's name in at most about a third of the width, and of what its questions are a sample."""
    longest = width // 24
    name = row["task"] if len(row["task"]) <= longest else f"{row['task'][: longest - 1]}…"
    return f"{name}\n{_questions(row)}" if row["sampled_from"] else name


def _pair_of_bars(axes: Axes, y: float, row: Row) -> None:
    for side, middle in zip(SIDES, (y - 0.19, y + 0.19), strict=True):
        value, error = row[side], row[f"{side}_stderr"] or 0
        if value is None:
            continue
        axes.barh(middle, value, 0.34, color=COLOURS[side])
        axes.errorbar(value, middle, xerr=error, color=COLOURS["ink"], elinewidth=1.2, capsize=2.5)
        # Keeps the chance line out of the number.
        box = {
            "facecolor": COLOURS["page"],
            "edgecolor": "none",
            "pad": 0.5,
        }
        axes.text(value + error + 0.015, middle, f"{value:.1%}", va="center", size=10.5, bbox=box)
    axes.vlines(row["chance"], y - 0.5, y + 0.5, color=COLOURS["ink"], linestyle=(0, (3, 2)), linewidth=1.2)


def _curves(metrics: list[StepRow], panels: dict[str, str], width: int, same_scale: bool = False) -> Figure:
    """Return a panel a metric, a line a topic, two panels side by side where `width` allows.

    `panels` maps keys of `metrics` to titles; with `same_scale` each two of them share their vertical axis.
    """
    columns = 2 if width == WIDTHS["wide"] else 1
    figure = Figure(
        figsize=(width / 72, 210 * len(panels) / columns / 72),
        layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04),
    )
    axes = list(figure.subplots(len(panels) // columns, columns, squeeze=False).flat)
    for index, (key, title) in enumerate(panels.items()):
        if same_scale and index % 2:
            axes[index].sharey(axes[index - 1])
        _curve(axes[index], metrics, key)
        axes[index].set_title(title)
        axes[index].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if index >= len(panels) - columns:
            axes[index].set_xlabel("Step")
    return figure


def _curve(axes: Axes, metrics: list[StepRow], key: str) -> None:
    """Draw one metric of every topic; a loss that spans more than a factor of 50 gets a logarithmic axis."""
    seen = []
    for number, topic in enumerate(_topics(metrics)):
        steps: list[int] = []
        values: list[float] = []
        for row in metrics:
            value = getattr(row, key)
            if row.topic == topic and value is not None:
                steps.append(row.step)
                values.append(value)
        colour = COLOURS[TOPIC_COLOURS[number % len(TOPIC_COLOURS)]]
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="." if len(steps) < 3 else None)
        seen += [value for value in values if math.isfinite(value) and value > 0]
    if key in LOSSES and seen and max(seen) > 50 * min(seen):
        # The first retain loss is zero: the adapter has not moved yet.
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _relearning(audit: dict[str, Any], curves: dict[str, Row], width: int) -> Figure:
    """Draw what is known after each number of fine-tuning steps on each text, and base, fine-tuned in the
    same way, in dashes.
    """
    figure = Figure(figsize=(width / 72, 240 / 72), layout="constrained")
    axes, is_share = figure.add_subplot(), audit["measured_in"] == "accuracy"
    for number, sides in enumerate(curves.values()):
        colour = COLOURS[TOPIC_COLOURS[number % len(TOPIC_COLOURS)]]
        for side, points in sides.items():
            steps, values = [0, *map(int, points)], [audit[side], *points.values()]
            axes.plot(
                steps,
                values,
                color=colour,
                linewidth=1.6,
                linestyle="-" if side == "unlearned" else (0, (3, 2)),
                marker=".",
            )
    axes.set_title("Accuracy" if is_share else "Loss in nats/token")
    axes.set_xlabel("Step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if is_share:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _sinks(metrics: list[StepRow], config: Row) -> Row:
    """Return in words how many positions were attention sinks, and whether steering left them out."""
    return {
        "count": sum(row.sinks for row in metrics),
        "tokens": sum(row.tokens for row in metrics),
        "masked": config["settings"].get("rmu", {}).get("sinks") == "masked",
    }


def _topics(metrics: list[StepRow]) -> list[str]:
    """Return the topics in the order of their first step."""
    return list(dict.fromkeys(row.topic for row in metrics))
