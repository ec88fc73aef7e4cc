"""Show the progress of a job on stderr, and hear Ctrl-C."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from lowmem_rmu.console import Console
from lowmem_rmu.runs.status import Stopped, Watcher

PLAIN_SECONDS = 5.0  # between two progress lines where the output is no terminal


class Interrupts:
    """The first Ctrl-C (or SIGTERM) asks the run to stop after its step; the second ends it at once.

    A closed terminal (SIGHUP) asks as the first Ctrl-C does, however often it is sent; nohup works as usual.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            before[hangup] = signal.signal(hangup, self._hang_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step; once more to stop at once.", file=sys.stderr)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        # A terminal is closed by now or will be in a moment: printing to it would fail.
        # Files and pipes still take what is printed.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            with suppress(OSError):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Bars:
    """Live progress in a terminal."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        # On a narrow terminal the figures are cut, not the counts.
        name = TextColumn("{task.description}", markup=False, table_column=Column(min_width=18, no_wrap=True))
        count, left = (
            MofNCompleteColumn(table_column=Column(min_width=9)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
        )
        figures = TextColumn(
            "{task.fields[figures]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        )
        self.progress = Progress(
            name, BarColumn(bar_width=10), count, left, figures, console=console, expand=True
        )
        self.interrupts = interrupts
        self.task = TaskID(0)
        self.stage = ""

    def started(self, stage: str, total: int) -> None:
        if self.stage != stage:
            self.stage, self.task = stage, self.progress.add_task(stage, total=None, figures="")
        self.progress.update(self.task, total=total or None)

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        self.progress.update(self.task, completed=done, figures=format_figures(figures))

    def noted(self, sentence: str) -> None:
        self.progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def asks_to_stop(self) -> bool:
        return self.interrupts.asked

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class Lines:
    """Plain lines, a few a minute, where the output is no terminal."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        self.console, self.interrupts = console, interrupts
        self.stage, self.total, self.began, self.last = "", 0, 0.0, 0.0

    def started(self, stage: str, total: int) -> None:
        if stage != self.stage:
            self._print(f"{stage} ...")
        self.stage, self.total, self.began, self.last = stage, total, time.monotonic(), time.monotonic()

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        now = time.monotonic()
        if not self.total:  # the total is unknown: show what comes next before it begins
            self._print(f"{self.stage}: {format_figures(figures)}")
        elif done and (now - self.last >= PLAIN_SECONDS or done == self.total):
            left = (now - self.began) / done * (self.total - done)
            self._print(
                f"{self.stage} {done}/{self.total}  {format_figures(figures)}  about {left:.0f} s left"
            )
            self.last = now

    def noted(self, sentence: str) -> None:
        self._print(sentence)

    def asks_to_stop(self) -> bool:
        return self.interrupts.asked

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def watched(folder: Path, called: str = "Run folder") -> Iterator[Bars | Lines]:
    """Show on stderr how far the work in a folder is, and hear Ctrl-C."""
    console, interrupts = Console(stderr=True), Interrupts()
    console.print(f"{called}: {folder}", highlight=False, soft_wrap=True)
    with interrupts.watched(), (Bars if console.is_terminal else Lines)(console, interrupts) as watcher:
        yield watcher


def format_figures(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else str(value)
        for key, value in figures.items()
    )


def wait_for(watcher: Watcher, folder: Path, job: str) -> Callable[[list[str]], None]:
    """Return what a job does while others come first: show which, and stop when the watcher asks to.

    The returned function raises Stopped.
    """
    show = show_waiting(watcher.noted, f"before this {job}")

    def wait(before: list[str]) -> None:
        if watcher.asks_to_stop():
            raise Stopped(folder, "the same command")
        show(before)

    return wait


def show_waiting(show: Callable[[str], None], where: str) -> Callable[[list[str]], None]:
    """Return a function that shows which jobs a waiting one comes after, whenever that changes."""
    shown: list[str] = []

    def show_changes(before: list[str]) -> None:
        if before != shown:
            shown[:] = before
            show(f"Waiting: {', '.join(before)} {where}.")

    return show_changes
