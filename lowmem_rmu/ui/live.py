"""What a run is doing now, as HTML and as curves, read from its folder."""

import html
from typing import Any

import pandas as pd

from lowmem_rmu.chat import SIDES
from lowmem_rmu.runs import STAGES, RunFolder, read_lines
from lowmem_rmu.ui.jobs import RunState

STAGE_WORDS = {
    "queue": "Waiting for its turn",
    "prepare": "Reading texts and questions",
    "evaluate-base": "Asking the model before",
    "unlearn": "Unlearning",
    "evaluate-unlearned": "Asking the model after",
    "report": "Writing the report",
}
LOSSES = {"forget_loss": "Forget loss", "retain_loss": "Retain loss"}
NORMS = {"forget_norm": "forget set", "retain_norm": "retain set"}
OUTPUT_LINES = 3
MISSING = "–"
TRACE = "(most recent call"
"""What a stack trace begins with, Python's own (plain or in a box) and that of PyTorch's C++."""


def progress(state: RunState, folder: RunFolder) -> str:
    """State, stage, how far, time left, and what has been found so far."""
    parts = [f"<p class='rmu-state rmu-{state.state}'><strong>{html.escape(state.name)}</strong>: {state.words}</p>"]
    if state.is_live and state.stage in STAGE_WORDS:
        parts.append(_bar(state))
    if state.state in ("failed", "interrupted"):
        parts.append(f"<pre class='rmu-error'>{html.escape(complaint(state, folder))}</pre>")
    return "".join(parts) + _figures(folder) + _answers(folder)


def _bar(state: RunState) -> str:
    number = STAGES.index(state.stage) + 1 if state.stage in STAGES else 0
    words = STAGE_WORDS[state.stage] + (f" (stage {number} of {len(STAGES)})" if number else "")
    if not state.total:
        return f"<p>{words} …</p>"
    left = f", about {_duration(state.seconds_left)} left" if state.seconds_left is not None else ""
    return (
        f"<p>{words}: {state.step:,} of {state.total:,}{left}</p>"
        f"<progress max='{state.total}' value='{state.step}' aria-label='{words}'></progress>"
    )


def complaint(state: RunState, folder: RunFolder) -> str:
    """Why a run ended, in its own words; never a stack trace: that stays in its output file."""
    output = folder.output.read_text(encoding="utf-8", errors="replace") if folder.output.exists() else ""
    told = state.error or ("" if state.state == "interrupted" else output)
    if not told.strip() or TRACE in told:
        return f"Its process ended before it was done; {folder.output.name} in its folder says more.\nResume goes on from the last checkpoint."
    return state.error or "\n".join(told.splitlines()[-OUTPUT_LINES:])


def _figures(folder: RunFolder) -> str:
    rows = read_lines(folder.metrics)
    if not rows:
        return ""
    last = rows[-1]
    shown = {"Step": f"{last['step']:,}", **{words: f"{last[key]:.4g}" for key, words in LOSSES.items()}}
    shown |= {f"Activation norm, {words}": f"{last[key]:.4g}" for key, words in NORMS.items() if last.get(key) is not None}
    return _list(shown)


def _answers(folder: RunFolder) -> str:
    """Right answers so far, a row a task."""
    told: dict[str, dict[str, str]] = {}
    for side in SIDES:
        answers = pd.DataFrame(read_lines(folder.answers(side)))
        if len(answers):
            tasks = answers.assign(task=answers["task"].astype(str)).groupby("task", sort=False)["correct"].agg(["mean", "size"])
            for name, row in tasks.iterrows():
                told.setdefault(str(name), {})[side] = f"{row['mean']:.1%} of {int(row['size']):,}"
    if not told:
        return ""
    head = "".join(f"<th scope='col'>{each}</th>" for each in ("Task", *SIDES))
    rows = (
        f"<tr><th scope='row'>{html.escape(name)}</th>{''.join(f'<td>{shares.get(side, MISSING)}</td>' for side in SIDES)}</tr>"
        for name, shares in told.items()
    )
    table = f"<table class='rmu-table'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<details open><summary>Right answers so far</summary><div class='rmu-scroll rmu-tall' tabindex='0'>{table}</div></details>"


def _list(shown: dict[str, str]) -> str:
    pairs = (f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>" for key, value in shown.items())
    return f"<dl class='rmu-figures'>{''.join(pairs)}</dl>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def curves(folder: RunFolder | None) -> tuple[pd.DataFrame | None, pd.DataFrame | None, pd.DataFrame | None]:
    """Forget loss, retain loss and activation norms by step, in the long form that a plot takes; None where there are none yet.

    A plot keeps the axes and colours of the first frame it is given, so that an empty one would stay empty.
    """
    rows = read_lines(folder.metrics) if folder else []
    losses = [_long(rows, {key: None}) for key in LOSSES]
    return losses[0], losses[1], _long(rows, NORMS)


def _long(rows: list[dict[str, Any]], keys: dict[str, Any]) -> pd.DataFrame | None:
    """Columns `step`, `value` and `line`: the topic, or what `keys` calls a key."""
    found = [(row["step"], row[key], words or row["topic"]) for row in rows for key, words in keys.items() if row.get(key) is not None]
    return pd.DataFrame(found, columns=["step", "value", "line"]) if found else None
