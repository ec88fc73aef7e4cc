"""The tab with what a run came to: verdict, charts, tables and answers, the report to keep, and two runs side
by side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from markupsafe import Markup

from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.summary import Summary, read_summary
from lowmem_rmu.report.html import render_comparison, render_parts
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import guarded

LOADING = "<p>Looking for finished runs …</p>"
EMPTY = "<p>No finished run yet. Start one under Unlearn.</p>"
NO_OTHER = ("no other run", "")
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def reading(name: str) -> Markup:
    """Return the placeholder for a run's results until they are there."""
    return Markup("<p>Reading the results of {} …</p>").format(name)


@dataclass(frozen=True)
class Results:
    """The tab, for the page to keep up to date and for other tabs to open a run in."""

    runs_dir: Path
    run: gr.Dropdown
    other: gr.Dropdown
    parts: gr.HTML
    download: gr.DownloadButton

    def refresh_on(self, *triggers: Callable[..., Any]) -> Any:
        """List the runs again at these events, such as `tab.select` and `demo.load`. What is chosen stays so
        as long as it is there.
        """
        chosen = [self.run, self.other]
        event = gr.on(triggers, guarded(self.refresh), chosen, chosen, **QUIET)
        event.success(guarded(self.tell_none), [self.run], [self.parts], **QUIET)
        return event

    def open_on(self, trigger: Callable[..., Any], name: gr.components.Component) -> Any:
        """Show the run that `name` holds at this event of another tab. Gives the event, for `.success` to
        change to this tab.
        """
        event = trigger(guarded(self.opened), [name], [self.run, self.other], **QUIET)
        self.show_after(event)
        return event

    def show_after(self, event: Any) -> None:
        """Show the chosen run even where it was chosen before: a run that was resumed has other results
        by the same name.
        """
        event.success(guarded(self.show), [self.run], [self.parts, self.download], **QUIET)

    def refresh(self, name: str | None, other: str | None) -> tuple[Any, Any]:
        """Return the choices of both lists; the newest run where none is chosen or the chosen one is gone."""
        names = choices(self.runs_dir)
        return offered(names, name), gr.update(choices=[NO_OTHER, *names])

    def tell_none(self, name: str | None) -> Any:
        """Say that there is no finished run, once that is known."""
        return gr.skip() if name or choices(self.runs_dir) else EMPTY

    def opened(self, name: str | None) -> tuple[Any, Any]:
        """Return the same with this run chosen. Raises UserError where it has no results."""
        results(self.runs_dir, name or "")
        names = choices(self.runs_dir)
        return gr.update(choices=names, value=name), gr.update(choices=[NO_OTHER, *names], value=NO_OTHER[1])

    def clear(self, name: str | None) -> tuple[str, Any, Any]:
        """Take away what belongs to the run that was chosen before, its report too."""
        return (
            (reading(name) if name else EMPTY),
            gr.update(value=None, interactive=False),
            gr.update(value="", visible=False),
        )

    def show(self, name: str | None) -> Iterator[tuple[Any, Any]]:
        """Yield a run's results and its report. One that cannot be shown leaves nothing of the run before
        it.
        """
        nothing = gr.update(value=None, interactive=False)
        if not name:
            yield EMPTY, nothing
            return
        try:
            run = RunFolder.open(self.runs_dir, name)
            shown = render_parts(run), self._report(run)
        except Exception:
            yield "", nothing
            raise
        yield shown

    def compare(self, name: str | None, other: str | None) -> Iterator[Any]:
        """Two runs side by side; nothing where no other is chosen."""
        nothing = gr.update(value="", visible=False)
        if not name or not other:
            yield nothing
            return
        try:
            shown = self._side_by_side(name, other)
        except Exception:
            yield nothing
            raise
        yield gr.update(value=shown, visible=True)

    def _side_by_side(self, name: str, other: str) -> str:
        if name == other:
            raise UserError("This is the run that is shown already: choose another one to compare it with.")
        return render_comparison(RunFolder.open(self.runs_dir, name), RunFolder.open(self.runs_dir, other))

    def _report(self, run: RunFolder) -> Any:
        """Return a copy to download: Gradio serves files from its own cache, and one called report.html would
        not say of what.
        """
        path = run.path / "report.html"
        if not path.is_file():
            return gr.update(value=None, interactive=False)
        copy = save_bytes_to_cache(
            path.read_bytes(), f"{run.path.name}-report.html", self.download.GRADIO_CACHE
        )
        return gr.update(value=copy, interactive=True)


def build(runs_dir: Path) -> Results:
    """Return the widgets of the tab, inside the tab that is open."""
    with gr.Row():
        run = run_dropdown(label="Run", info="Finished runs, newest first", scale=3, min_width=220)
        other = run_dropdown(
            [NO_OTHER], value=NO_OTHER[1], label="Compare with", info="Task by task", scale=3, min_width=220
        )
    with gr.Row():
        refresh = gr.Button("Refresh", min_width=120)
        download = gr.DownloadButton("Download the report", interactive=False, min_width=120)
    comparison, parts = (
        gr.HTML(visible=False, apply_default_css=False),
        gr.HTML(LOADING, apply_default_css=False),
    )
    tab = Results(runs_dir, run, other, parts, download)
    # Whatever changes what is chosen (a hand, Refresh, another tab) is followed by showing it.
    # What was shown goes at once, and what is still being read for the run before it does not come any more.
    cleared = run.change(
        guarded(tab.clear),
        [run],
        [parts, download, comparison],
        queue=False,
        trigger_mode="multiple",
        **QUIET,
    )
    shown = cleared.then(guarded(tab.show), [run], [parts, download], api_visibility="private")
    run.change(None, cancels=[shown])
    cleared.then(guarded(tab.compare), [run, other], [comparison], **QUIET)
    other.change(guarded(tab.compare), [run, other], [comparison], **QUIET)
    tab.show_after(tab.refresh_on(refresh.click))
    return tab


def choices(runs_dir: Path) -> list[str]:
    """Return the runs that have results, newest first."""
    return [run.path.name for run in RunFolder.all(runs_dir) if (run.path / "summary.json").is_file()]


def results(runs_dir: Path, run_name: str) -> Summary:
    """Read a run's `summary.json`. Raises UserError where there is no such run or it has no results."""
    return read_summary(RunFolder.open(runs_dir, run_name))
