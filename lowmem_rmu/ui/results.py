"""The tab with what a run came to: verdict, charts, tables and answers, the report to keep, and two runs side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from lowmem_rmu.errors import UserError
from lowmem_rmu.report import read_summary, render_comparison, render_parts
from lowmem_rmu.runs import RunFolder
from lowmem_rmu.ui.guard import guarded

EMPTY = "<p>No finished run yet. Start one under Unlearn.</p>"
NO_OTHER = ("no other run", "")
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Results:
    """The tab, for the page to keep up to date and for other tabs to open a run in."""

    runs_dir: Path
    run: gr.Dropdown
    other: gr.Dropdown
    parts: gr.HTML
    download: gr.DownloadButton

    def refresh_on(self, *triggers: Callable[..., Any]) -> Any:
        """Lists the runs anew at these events, such as `tab.select` and `demo.load`. What is chosen stays so as long as it is there."""
        chosen = [self.run, self.other]
        return gr.on(triggers, guarded(self.refresh), chosen, chosen, **QUIET)

    def open_on(self, trigger: Callable[..., Any], name: gr.components.Component) -> Any:
        """Shows the run that `name` holds at this event of another tab. Gives the event, for `.success` to change to this tab."""
        event = trigger(guarded(self.opened), [name], [self.run, self.other], **QUIET)
        self.show_after(event)
        return event

    def show_after(self, event: Any) -> None:
        """Shows the chosen run even where it was chosen before: a run that was gone on with has other results by the same name."""
        event.success(guarded(self.show), [self.run], [self.parts, self.download], **QUIET)

    def refresh(self, name: str | None, other: str | None) -> tuple[Any, Any]:
        """What is to be chosen from, for both lists; the newest run where none is chosen or the chosen one is gone."""
        names = choices(self.runs_dir)
        name = name if name in names else next(iter(names), None)
        other = other if other in names else NO_OTHER[1]
        return gr.update(choices=names, value=name), gr.update(choices=[NO_OTHER, *names], value=other)

    def opened(self, name: str | None) -> tuple[Any, Any]:
        """The same with this run chosen. Raises UserError where it has no results."""
        results(self.runs_dir, name or "")
        return self.refresh(name, None)

    def show(self, name: str | None) -> Iterator[tuple[Any, Any]]:
        """A run's results and its report. One that cannot be shown leaves nothing of the run before it standing."""
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
        """A copy to download: Gradio serves files from its own cache, and one called report.html would not say of what."""
        path = run.path / "report.html"
        if not path.is_file():
            return gr.update(value=None, interactive=False)
        copy = save_bytes_to_cache(path.read_bytes(), f"{run.path.name}-report.html", self.download.GRADIO_CACHE)
        return gr.update(value=copy, interactive=True)


def build(runs_dir: Path) -> Results:
    """The widgets of the tab, inside the tab that is open."""
    with gr.Row():
        run = gr.Dropdown([], label="Run", info="Finished runs, newest first", scale=3, min_width=220)
        other = gr.Dropdown([NO_OTHER], value=NO_OTHER[1], label="Compare with", info="Task by task", scale=3, min_width=220)
    with gr.Row():
        refresh = gr.Button("Refresh", min_width=120)
        download = gr.DownloadButton("Download the report", interactive=False, min_width=120)
    comparison, parts = gr.HTML(visible=False, apply_default_css=False), gr.HTML(EMPTY, apply_default_css=False)
    tab = Results(runs_dir, run, other, parts, download)
    # Whatever changes what is chosen (a hand, Refresh, another tab) is followed by showing it.
    run.change(guarded(tab.show), [run], [parts, download], api_visibility="private")
    gr.on([run.change, other.change], guarded(tab.compare), [run, other], [comparison], **QUIET)
    tab.show_after(tab.refresh_on(refresh.click))
    return tab


def choices(runs_dir: Path) -> list[str]:
    """The runs that have results, newest first."""
    return [run.path.name for run in RunFolder.all(runs_dir) if (run.path / "summary.json").is_file()]


def results(runs_dir: Path, run_name: str) -> dict[str, Any]:
    """What a run came to, as its `summary.json` has it. Raises UserError where there is no such run or it has no results."""
    return read_summary(RunFolder.open(runs_dir, run_name))
