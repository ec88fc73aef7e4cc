"""The page: its tabs in the order of the work, and the named endpoints of its API."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from lowmem_rmu.report.html import app_stylesheet
from lowmem_rmu.ui import jobs, offers
from lowmem_rmu.ui.guard import guarded
from lowmem_rmu.ui.tabs import chat, results, unlearn
from lowmem_rmu.ui.tabs.audit import AuditTab
from lowmem_rmu.ui.tabs.export import ExportTab
from lowmem_rmu.ui.tabs.runs import RunsTab
from lowmem_rmu.ui.uploads import Own

TITLE = "lowmem-rmu"
CSS = """
.rmu-scroll { overflow-x: auto; }
.rmu-table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.rmu-tall { max-height: 20rem; overflow-y: auto; }
.prose .rmu-table th, .prose .rmu-table td { padding: .3rem .75rem .3rem 0;
  text-align: left; vertical-align: top; border: 0; }
.prose .rmu-table, .prose .rmu-table tr, .prose .rmu-table thead { border: 0; }
.prose .rmu-table th, .prose .rmu-table td { border-bottom: 1px solid var(--border-color-primary); }
.gradio-container { --block-info-text-color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.rmu-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr));
  gap: .5rem 1.5rem; margin: .5rem 0; }
.rmu-figures dt { color: var(--block-info-text-color); font-size: .85rem; }
.rmu-figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.rmu-error { white-space: pre-wrap; padding: .75rem; border-left: 4px solid #b3402a; }
.rmu-presets .wrap { flex-direction: column; }
.toast-text { white-space: pre-line; }
progress { width: 100%; }
"""
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Of the machine itself: none is fetched from elsewhere."""

TRANSLATIONS = {"common.complete": "Done"}
"""Words that Gradio announces to screen readers and has in none of its languages: it would read out the
key.
"""


def style() -> str:
    return CSS + chat.CSS + app_stylesheet()


def build_page(runs_dir: Path, device: torch.device, model: chat.LoadedModel) -> gr.Blocks:
    """Return the page over a runs folder, whose runs and chat model are on `device`."""
    unlearning = unlearn.Unlearning(runs_dir, device, model)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        add_api(unlearning)  # first, or a button's event would take its names
        gr.Markdown(
            "# lowmem-rmu\n"
            "Make a chat model forget, see what it still knows, and talk to it before and after."
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Unlearn", id="unlearn"):
                unlearn_tab = unlearn.UnlearnTab(unlearning)
            with gr.Tab("Results", id="results") as results_item:
                results_tab = results.build(runs_dir)
            with gr.Tab("Chat", id="chat") as chat_item:
                chat_tab = chat.build(runs_dir, device, model)
            with gr.Tab("Audit", id="audit") as audit_item:
                audit_tab = AuditTab(runs_dir, device)
            with gr.Tab("Export", id="export") as export_item:
                export_tab = ExportTab(runs_dir, device)
            with gr.Tab("Runs", id="runs") as runs_item:
                runs_tab = RunsTab(runs_dir)
        unlearn_tab.wire(page.load)
        results_tab.refresh_on(results_item.select, page.load)
        gr.on(
            [chat_item.select, page.load],
            guarded(chat_tab.refresh),
            [chat_tab.run],
            chat_tab.refreshed,
            api_visibility="private",
        )
        audit_tab.wire(audit_item.select, page.load)
        export_tab.wire(export_item.select, page.load)
        runs_tab.wire(runs_item.select, page.load)
        opened = results_tab.open_on(runs_tab.open_button.click, runs_tab.run)
        opened.success(lambda: gr.update(selected="results"), [], [tabs], api_visibility="private")
    return page


def add_api(unlearning: unlearn.Unlearning) -> None:
    """Add the endpoints that `gradio_client` sees, each documented by its function's docstring."""
    runs_dir, device = unlearning.runs_dir, unlearning.device

    def list_presets() -> list[dict]:
        """List all presets with what they forget, the memory they need, and whether they fit this machine."""
        return offers.table(device)

    def start(preset: str, name: str = "", settings: str = "") -> dict:
        """Start a run of a preset, or put it in the queue. settings: key=value a line. Gives the run's state
        with its name.
        """
        folder = unlearning.start(preset, offers.chosen(preset, {}, settings), Own([], [], ""), name)
        return vars(jobs.state_of(folder))

    def status(run: str) -> dict:
        """Return the status of a run: name, state, stage, step, total, place in the queue, seconds left of
        the stage, error.
        """
        return vars(jobs.state_of(jobs.find(runs_dir, run)))

    def stop(run: str) -> dict:
        """Ask a run to stop after its step; it can go on later. Gives its state."""
        jobs.stop(jobs.find(runs_dir, run))
        return vars(jobs.state_of(jobs.find(runs_dir, run)))

    def ask(
        run: str, prompt: str, max_new_tokens: float = 128, temperature: float = 0.0, seed: float = 0
    ) -> dict:
        """Return the answers of a run's model before and after unlearning: base and unlearned."""
        return chat.ask(
            unlearning.chat_model, runs_dir, device, run, prompt, int(max_new_tokens), temperature, int(seed)
        )

    def run_results(run: str) -> dict:
        """Return the summary.json of a finished run."""
        return asdict(results.results(runs_dir, run))

    for function, name in (
        (list_presets, "list_presets"),
        (start, "start"),
        (status, "status"),
        (stop, "stop"),
        (run_results, "results"),
    ):
        gr.api(guarded(function), api_name=name, queue=False)
    gr.api(guarded(ask), api_name="chat", concurrency_limit=1)
