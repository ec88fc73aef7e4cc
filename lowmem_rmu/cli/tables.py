"""Tables of what a run or an evaluation measured."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from lowmem_rmu.evaluation.compare import Row, TextRow


def accuracy_table(rows: "list[Row]", unasked: dict[str, list[str]] | None = None) -> Table:
    """Accuracy in percent with its standard error; subjects only where they are few, or next to what is
    forgotten. `unasked` names the subjects of a task that have no question.
    """
    from lowmem_rmu.evaluation.compare import counted
    from lowmem_rmu.evaluation.statistics import LUCK

    title = "Accuracy in % (± standard error); chance 25; * larger than noise"
    table = _table(title, ["Task", "Should be"], ["Questions", "Base", "Unlearned", "Change", ""])
    subjects = sum(row.group is not None and not row.is_group for row in rows)
    for row in rows:
        if row.group and not row.is_group and subjects > 12 and row.role != "adjacent":
            continue
        cells = [
            _percent(getattr(row, side), getattr(row, f"{side}_stderr"))
            for side in ("base", "unlearned", "change")
        ]
        mark = "*" if row.p_value is not None and row.p_value < LUCK else ""
        table.add_row(_task(row), row.role, counted(row.questions, row.sampled_from), *cells, mark)
    if unasked:
        missing = [f"{task}: no question on {', '.join(names)}" for task, names in unasked.items()]
        table.caption = f"Fewer questions than subjects. {'; '.join(missing)}."
    return table


def _task(row: "Row") -> str:
    """Return a task, and how it was asked where that is unusual; its averages and subjects stand under it,
    without its name.
    """
    from lowmem_rmu.evaluation.compare import asked_how

    if row.group is None:
        return " ".join(filter(None, (row.task, asked_how(row.num_fewshot, row.scoring))))
    return f"  {row.task.removeprefix(row.group + '_')}"


def text_table(texts: "list[TextRow]") -> Table:
    """Return losses on texts that training never saw; below them how far unlearned predicts from base, where
    that was measured.
    """
    title = "Loss on held-out text in nats/token (change ± standard error)"
    table = _table(title, ["Text", "Should be"], ["Tokens", "Base", "Unlearned", "Change", "Bits/byte"])
    for row in texts:
        base, unlearned, *bits = (
            _nats(getattr(row, key))
            for key in ("base", "unlearned", "base_bits_per_byte", "unlearned_bits_per_byte")
        )
        change = "-" if row.change is None else f"{_nats(row.change)} ± {_nats(row.change_stderr)}"
        table.add_row(row.name, row.role, f"{row.tokens:,}", base, unlearned, change, " → ".join(bits))
    far = [f"{row.name} {row.kl:.4f} ± {row.kl_stderr:.4f}" for row in texts if row.kl is not None]
    table.caption = f"KL from base to unlearned in nats/token: {', '.join(far)}" if far else None
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    """Narrow enough for 80 columns; where that is not enough, the names are folded, not the numbers."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in left + right:
        table.add_column(
            column, justify="left" if column in left else "right", no_wrap=column != left[0], overflow="fold"
        )
    return table


def _percent(share: float | None, stderr: float | None) -> str:
    return "-" if share is None or stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
