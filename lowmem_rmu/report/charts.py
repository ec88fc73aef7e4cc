"""The report's charts, drawn as SVG."""

import math
import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from lowmem_rmu.evaluation.compare import Row
from lowmem_rmu.report.rows import SIDES, by_role, question_count
from lowmem_rmu.runs.records import AuditResult, StepRow

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
Curves = dict[str, dict[str, float]]
"""By side and number of fine-tuning steps: what is known then."""
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


def draw_charts(name: str, draw: Callable[[int], Figure]) -> dict[str, Markup]:
    """Draw one chart as inline SVG for each of WIDTHS."""
    return {size: as_svg(f"{name}-{size}", draw, width) for size, width in WIDTHS.items()}


def as_svg(name: str, draw: Callable[[int], Figure], width: int) -> Markup:
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


def draw_bars(rows: list[Row], width: int) -> Figure:
    """Accuracy of base and unlearned, a pair of bars a task under the heading of its role."""
    lines: list[Any] = [line for heading, group in by_role(rows) for line in (heading, *group)]
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
    name = row.task if len(row.task) <= longest else f"{row.task[: longest - 1]}…"
    return f"{name}\n{question_count(row)}" if row.sampled_from else name


def _pair_of_bars(axes: Axes, y: float, row: Row) -> None:
    for side, middle in zip(SIDES, (y - 0.19, y + 0.19), strict=True):
        value, error = getattr(row, side), getattr(row, f"{side}_stderr") or 0
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
    axes.vlines(row.chance, y - 0.5, y + 0.5, color=COLOURS["ink"], linestyle=(0, (3, 2)), linewidth=1.2)


def draw_curves(
    metrics: list[StepRow], panels: dict[str, str], width: int, same_scale: bool = False
) -> Figure:
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
    for number, topic in enumerate(topic_names(metrics)):
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


def draw_relearning(audit: AuditResult, curves: dict[str, Curves], width: int) -> Figure:
    """Draw what is known after each number of fine-tuning steps on each text, and base, fine-tuned in the
    same way, in dashes.
    """
    figure = Figure(figsize=(width / 72, 240 / 72), layout="constrained")
    axes, is_share = figure.add_subplot(), audit.is_accuracy
    for number, sides in enumerate(curves.values()):
        colour = COLOURS[TOPIC_COLOURS[number % len(TOPIC_COLOURS)]]
        for side, points in sides.items():
            steps, values = [0, *map(int, points)], [getattr(audit, side), *points.values()]
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


def count_sinks(metrics: list[StepRow], config: dict[str, Any]) -> dict[str, Any]:
    """Return in words how many positions were attention sinks, and whether steering left them out."""
    return {
        "count": sum(row.sinks for row in metrics),
        "tokens": sum(row.tokens for row in metrics),
        "masked": config["settings"].get("rmu", {}).get("sinks") == "masked",
    }


def topic_names(metrics: list[StepRow]) -> list[str]:
    """Return the topics in the order of their first step."""
    return list(dict.fromkeys(row.topic for row in metrics))
