"""What a run is doing now, as HTML and as curves, read from its folder."""

from collections.abc import Mapping

import pandas as pd
from markupsafe import Markup

from lowmem_rmu.chat.conversation import SIDES
from lowmem_rmu.runs.files import read_lines
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.runs.records import StepRow, TaskMark
from lowmem_rmu.ui import markup
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
DIVERGENCES = {
    "retain_kl": "text to keep",
    "question_kl": "questions to keep",
    "topic_kl": "topic",
    "topic_question_kl": "questions about the topic",
}
SHIFTS = {key.replace("_kl", "_shift"): words for key, words in DIVERGENCES.items()}
"""The same of a run that loaded no layer above the target layer."""
OUTPUT_LINES = 3
MISSING = "–"
TRACE = "(most recent call"
"""What a stack trace begins with, Python's own (plain or in a box) and that of PyTorch's C++."""


def progress(state: RunState, folder: RunFolder) -> str:
    """State, stage, how far, time left, and what has been found so far."""
    parts = [
        Markup("<p class='rmu-state rmu-{}'><strong>{}</strong>: {}</p>").format(
            state.state, state.name, state.words
        )
    ]
    if state.is_live and state.stage in STAGE_WORDS:
        parts.append(_bar(state))
    if state.state in ("failed", "interrupted"):
        parts.append(markup.complaint(complaint(state, folder)))
    return markup.joined([*parts, _figures(folder), _answers(folder)])


def can_go_on(state: RunState) -> bool:
    """Tell whether Resume has something to do: a run that is done would be run again."""
    return state.state in ("stopped", "interrupted", "failed")


def _bar(state: RunState) -> Markup:
    number = STAGES.index(state.stage) + 1 if state.stage in STAGES else 0
    words = STAGE_WORDS[state.stage] + (f" (stage {number} of {len(STAGES)})" if number else "")
    if not state.total:
        return Markup("<p>{} …</p>").format(words)
    left = f", about {_duration(state.seconds_left)} left" if state.seconds_left is not None else ""
    count = Markup("<p>{}: {:,} of {:,}{}</p>").format(words, state.step, state.total, left)
    return count + Markup("<progress max='{}' value='{}' aria-label='{}'></progress>").format(
        state.total, state.step, words
    )


def complaint(state: RunState, folder: RunFolder) -> str:
    """Why a run ended, in its own words; never a stack trace: that stays in its output file."""
    output = folder.output.read_text(encoding="utf-8", errors="replace") if folder.output.exists() else ""
    told = state.error or ("" if state.state == "interrupted" else output)
    if not told.strip() or TRACE in told:
        return (
            f"Its process ended before it was done; {folder.output.name} in its folder says more.\n"
            "Resume continues from the last checkpoint."
        )
    return state.error or "\n".join(told.splitlines()[-OUTPUT_LINES:])


def _figures(folder: RunFolder) -> Markup:
    rows = read_lines(folder.metrics, StepRow)
    if not rows:
        return Markup("")
    last = rows[-1]
    shown = {"Step": f"{last.step:,}"}
    shown |= {words: f"{getattr(last, key):.4g}" for key, words in LOSSES.items()}
    shown |= {
        f"Activation norm, {words}": f"{getattr(last, key):.4g}"
        for key, words in NORMS.items()
        if getattr(last, key) is not None
    }
    return _list(shown)


def _answers(folder: RunFolder) -> Markup:
    """Right answers so far, a row a task."""
    told: dict[str, dict[str, str]] = {}
    for side in SIDES:
        answers = pd.DataFrame(read_lines(folder.answers(side), TaskMark))
        if len(answers):
            tasks = (
                answers.assign(task=answers["task"].astype(str))
                .groupby("task", sort=False)["correct"]
                .agg(["mean", "size"])
            )
            for name, row in tasks.iterrows():
                told.setdefault(str(name), {})[side] = f"{row['mean']:.1%} of {int(row['size']):,}"
    if not told:
        return Markup("")
    rows = [(name, *(shares.get(side, MISSING) for side in SIDES)) for name, shares in told.items()]
    table = markup.table(("Task", *SIDES), rows, tall=True)
    return Markup("<details open><summary>Right answers so far</summary>{}</details>").format(table)


def _list(shown: dict[str, str]) -> Markup:
    pairs = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(key, value) for key, value in shown.items())
    return Markup("<dl class='rmu-figures'>{}</dl>").format(markup.joined(pairs))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def curves(folder: RunFolder | None) -> list[pd.DataFrame | None]:
    """Return forget loss, retain loss, activation norms, and what the guard saw, by step; None where there
    are none yet.

    Frames are in the long form that a plot takes.

    A plot keeps the axes and colours of the first frame it is given, so that an empty one would stay empty.
    """
    rows = read_lines(folder.metrics, StepRow) if folder else []
    losses = [_long(rows, {key: None}) for key in LOSSES]
    return [*losses, _long(rows, NORMS), _long(rows, DIVERGENCES | SHIFTS)]


def _long(rows: list[StepRow], keys: Mapping[str, str | None]) -> pd.DataFrame | None:
    """Return columns `step`, `value` and `line`: the topic, or what `keys` calls a key."""
    found = []
    for row in rows:
        for key, words in keys.items():
            value = getattr(row, key)
            if value is not None:
                found.append((row.step, value, words or row.topic))
    return pd.DataFrame(found, columns=["step", "value", "line"]) if found else None
