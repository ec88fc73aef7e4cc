"""The tab with every run: what it is, and what can be done with it."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.summary import Headline, ListedSummary
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import intact_record
from lowmem_rmu.ui import jobs, live
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import guarded

COLUMNS = ["Run", "State", "Preset", "Verdict", "Size"]
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def rows(runs_dir: Path) -> list[list[str]]:
    """Return a row a run: COLUMNS."""
    found = []
    for name in jobs.names(runs_dir):
        folder = jobs.find(runs_dir, name)
        preset = (
            next(iter(folder.path.glob("*.yaml")), folder.path).stem
            if folder.is_reserved
            else _config(folder).get("preset", "–")
        )
        found.append([name, jobs.state_of(folder).words, preset, _verdict(folder), _size(folder)])
    return found


def _config(folder: RunFolder) -> dict[str, Any]:
    """Empty where there is none or it is damaged: such a run is listed too, and can be deleted."""
    with suppress(UserError):
        return folder.config
    return {}


def _verdict(folder: RunFolder) -> str:
    summary = intact_record(folder.path / "summary.json", ListedSummary)
    return Headline.of(folder, summary.verdict).sentence if summary else "–"


def _size(folder: RunFolder) -> str:
    size = 0
    for parent, _, files in os.walk(folder.path):
        for file in files:
            with suppress(FileNotFoundError):  # a run under way replaces its files
                size += (Path(parent) / file).lstat().st_size
    return f"{size / 1e6:,.1f} MB"


class RunsTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.table = gr.Dataframe(headers=COLUMNS, value=[], interactive=False, wrap=True, label="Runs")
        self.run = run_dropdown(label="Run", info="What the buttons below are for.")
        with gr.Row():
            self.open_button = gr.Button("Show results", min_width=120)
            self.resume_button = gr.Button("Resume", min_width=120)
            self.delete_button = gr.Button("Delete …", variant="stop", min_width=120)
        with gr.Row(visible=False) as self.question:
            self.sure, self.asked_about = gr.Markdown(), gr.State(None)
            self.really_button = gr.Button("Delete for good", variant="stop", min_width=120)
            self.keep_button = gr.Button("Keep it", min_width=120)
        with gr.Row():
            self.new_name = gr.Textbox("", label="New name", max_length=100, scale=3)
            self.rename_button = gr.Button("Rename", min_width=120)
        with gr.Accordion("Its settings", open=False):
            self.settings = gr.Code(language="yaml", interactive=False, label="As a preset")

    def wire(self, *triggers: Callable[..., Any]) -> None:
        """Connect the events; the list is read again at `triggers`."""
        listed = [self.table, self.run]
        gr.on(triggers, guarded(self.refresh), [self.run], listed, **QUIET)
        self.run.change(guarded(self.settings_of), [self.run], [self.settings], **QUIET)
        self.resume_button.click(guarded(self.resume), [self.run], listed, **QUIET)
        self.table.select(guarded(self.chosen), [], [self.run], **QUIET)
        self.rename_button.click(guarded(self.rename), [self.run, self.new_name], listed, **QUIET)
        gr.on(
            [self.run.change, self.table.change],
            guarded(self.buttons),
            [self.run],
            [self.resume_button],
            **QUIET,
        )
        self.delete_button.click(
            guarded(self.ask), [self.run], [self.question, self.sure, self.asked_about], **QUIET
        )
        self.keep_button.click(lambda: gr.update(visible=False), [], [self.question], **QUIET)
        self.really_button.click(
            guarded(self.delete), [self.asked_about, self.run], [*listed, self.question], **QUIET
        )

    def refresh(self, name: str | None) -> tuple[Any, Any]:
        """Return the table, and the runs to choose from; what is chosen stays."""
        return rows(self.runs_dir), offered(jobs.names(self.runs_dir), name)

    def chosen(self, event: gr.SelectData) -> str:
        """Return the run whose row was clicked."""
        return event.row_value[0]

    def settings_of(self, name: str | None) -> str:
        settings = _config(jobs.find(self.runs_dir, name)).get("settings") if name else None
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else ""

    def resume(self, name: str | None) -> tuple[Any, Any]:
        jobs.resume(jobs.find(self.runs_dir, name))
        return self.refresh(name)

    def rename(self, name: str | None, new_name: str) -> tuple[Any, Any]:
        if not new_name.strip():
            raise UserError("Type the new name first.")
        renamed = jobs.rename(jobs.find(self.runs_dir, name), new_name.strip()).path.name
        return rows(self.runs_dir), gr.update(choices=jobs.names(self.runs_dir), value=renamed)

    def ask(self, name: str | None) -> tuple[Any, str, str]:
        """Ask before deleting, and keep which run was asked about: another may be chosen meanwhile."""
        folder = jobs.find(self.runs_dir, name)
        question = f"Delete **{folder.path.name}** ({_size(folder)})? This cannot be undone."
        return gr.update(visible=True), question, folder.path.name

    def buttons(self, name: str | None) -> Any:
        """Resume is there for a run that can go on."""
        with suppress(UserError):  # none is chosen, or it is gone
            return gr.update(interactive=live.can_go_on(jobs.state_of(jobs.find(self.runs_dir, name))))
        return gr.update(interactive=False)

    def delete(self, name: str | None, chosen: str | None = None) -> tuple[Any, Any, Any]:
        """Delete the run that was asked about; `chosen` is the one that is chosen by now."""
        jobs.delete(jobs.find(self.runs_dir, name))
        return *self.refresh(chosen if chosen != name else None), gr.update(visible=False)
