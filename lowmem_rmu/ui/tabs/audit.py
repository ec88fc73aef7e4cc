"""The tab to ask whether what a run forgot is gone or only hidden: attacks in a separate process, and what
they found.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from markupsafe import Markup

from lowmem_rmu.audit.suite import ATTACKS
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.summary import read_audit
from lowmem_rmu.report.html import render_audit
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import failure, guarded, on_the_page
from lowmem_rmu.ui.markup import complaint, paragraph

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
REFRESH_SECONDS = 2.0
NOTHING = Markup("<p>Not audited yet.</p>")
NOT_ASKED = "not asked for"
"""The reason that an audit names for an attack that nobody chose."""
STOPPED = Markup("<p><strong>Stopped</strong>; nothing is lost. Audit continues it.</p>")


def minutes(budget: str) -> float | None:
    """Parse a budget in minutes; None for an empty field. Raises UserError for anything else."""
    try:
        found = float(budget.strip().replace(",", ".")) if budget.strip() else None
    except ValueError:
        found = math.nan
    if found is not None and not (math.isfinite(found) and found > 0):
        raise UserError(
            f'"{budget.strip()}" is no budget: give minutes, such as 30, or leave the field empty.'
        )
    return found


def start(folder: RunFolder, attacks: list[str], budget: float | None, over: bool, device: str) -> None:
    """Start the audit's process, which continues an earlier audit unless it is to start over.

    Raises UserError where the run has no adapter, or is being audited already.
    """
    if not folder.adapter.exists():
        raise UserError(
            f"Run {folder.path.name} has no adapter yet.",
            "Resume it, and wait until it has unlearned.",
        )
    command = [
        sys.executable,
        "-m",
        "lowmem_rmu",
        "audit",
        str(folder.path.resolve()),
        "--attacks",
        ",".join(attacks),
        "--device",
        device,
    ]
    command += [] if budget is None else ["--budget", f"{budget:g}"]
    command += ["--again"] if over else earlier_settings(folder)
    with one_at_a_time(folder.path.parent):
        if jobs.is_audited_now(folder):
            raise UserError(
                f"Run {folder.path.name} is being audited already: wait until that is done, or stop it."
            )
        folder.audit_output.unlink(missing_ok=True)
        jobs.begin(folder, "audit")
        jobs.spawn(folder.path.parent.resolve(), folder.audit_name, command, folder.audit_output)


def earlier_settings(folder: RunFolder) -> list[str]:
    """Return options that an audit from the command line was begun with, so that this one can go on with
    it.
    """
    with suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder.audit / "settings.json").read_text(encoding="utf-8"))
        given = [(f"--{key}", settings.get(key)) for key in ("limit", "seed")]
        return [part for option, value in given if value is not None for part in (option, str(value))]
    return []


def progress(folder: RunFolder) -> str:
    """Return the state of an audit as HTML."""
    status = folder.read_job_status("audit")
    if jobs.is_audited_now(folder):
        return paragraph("At work", f": {jobs.doing(folder, folder.audit_name, status)} …")
    if status is None:
        return "" if folder.audit_result.exists() else NOTHING
    if status.state == "done":
        return paragraph("Done")
    if status.state in ("stopped", "waiting"):  # a process that waits ends at once
        return STOPPED
    return failure(status, "Audit continues where it was.")


def found(folder: RunFolder) -> str:
    """Return the results of the attacks so far as HTML."""
    try:
        return render_audit(folder)
    except UserError as error:
        return complaint(on_the_page(error))


def seen_of(folder: RunFolder) -> str:
    """Change when what was found does."""
    with suppress(OSError):
        return f"{folder.path.name} {folder.audit_result.stat().st_mtime_ns}"
    return folder.path.name


def attacks_of(folder: RunFolder) -> list[str]:
    """Return the attacks that the run's audit was asked for; all where there was none. Raises UserError where
    it cannot be read.
    """
    audit = read_audit(folder)
    results = audit.attacks if audit else ()
    asked_for = [each.attack for each in results if each.attack in ATTACKS and each.reason != NOT_ASKED]
    return asked_for or list(ATTACKS)


class AuditTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, runs_dir: Path, device: torch.device) -> None:
        self.runs_dir, self.device = runs_dir, device
        self.run = run_dropdown(label="Run", info="Runs that have finished unlearning.")
        offered = [(f"{name}: {attack.asks}", name) for name, attack in ATTACKS.items()]
        self.attacks = gr.CheckboxGroup(
            offered, value=list(ATTACKS), label="Attacks", elem_classes="rmu-presets"
        )
        told = "What does not fit is named instead. Empty: as long as it takes."
        self.budget = gr.Textbox("", label="Budget in minutes", info=told, max_length=20)
        self.over = gr.Checkbox(
            False, label="Start over", info="Discard what an earlier audit of the run found."
        )
        with gr.Row():
            self.audit_button = gr.Button("Audit", variant="primary", min_width=120)
            self.stop_button = gr.Button("Stop", min_width=120)
        self.told, self.found = gr.HTML(NOTHING), gr.HTML("", apply_default_css=False)
        self.seen, self.timer = gr.State(("", "")), gr.Timer(REFRESH_SECONDS)

    def wire(self, *triggers: Callable[..., Any]) -> None:
        """Connect the events; the runs are read again at `triggers`."""
        shown = [self.told, self.found, self.seen]
        gr.on(triggers, guarded(self.refresh), [self.run], [self.run], **QUIET)
        self.run.change(guarded(self.show), [self.run], shown, **QUIET)
        self.run.change(guarded(self.choose), [self.run], [self.attacks], **QUIET)
        self.audit_button.click(
            guarded(self.start),
            [self.run, self.attacks, self.budget, self.over],
            [*shown, self.over],
            **QUIET,
        )
        self.stop_button.click(guarded(self.stop), [self.run], shown, **QUIET)
        self.timer.tick(guarded(self.tick), [self.run, self.seen], shown, queue=False, **QUIET)

    def refresh(self, name: str | None) -> Any:
        names = [run.path.name for run in RunFolder.all(self.runs_dir) if run.adapter.exists()]
        return offered(names, name)

    def choose(self, name: str | None) -> Any:
        """Turn the fields to the attacks of the run's last audit; without one all are chosen."""
        with suppress(UserError):  # none is chosen, it is gone, or its audit is damaged: `show` says so
            return attacks_of(RunFolder.open(self.runs_dir, name or ""))
        return gr.skip()

    def start(self, name: str | None, attacks: list[str], budget: str, over: bool) -> tuple[Any, ...]:
        """Show how far it is, and take the mark from "start over": the next click is to go on."""
        if not name:
            raise UserError(
                "Choose a run first.",
                "There is none yet? Start one in the Unlearn tab.",
            )
        if not attacks:
            raise UserError("Choose an attack first.")
        start(RunFolder.open(self.runs_dir, name), attacks, minutes(budget), over, self.device.type)
        return *self.show(name), False

    def stop(self, name: str | None) -> tuple[str, str, tuple[str, str]]:
        if not name:
            raise UserError("Choose a run first.")
        jobs.stop_audit(RunFolder.open(self.runs_dir, name))
        return self.show(name)

    def show(self, name: str | None) -> tuple[str, str, tuple[str, str]]:
        """Return the audit's state, its results, and what identifies both now."""
        if not name:
            return NOTHING, "", ("", "")
        folder = RunFolder.open(self.runs_dir, name)
        told, seen = progress(folder), seen_of(folder)
        return told, found(folder), (told, seen)

    def tick(self, name: str | None, seen: tuple[str, str]) -> tuple[Any, ...]:
        """Update what has changed, and nothing else, so that unfolded parts stay unfolded."""
        try:
            folder = RunFolder.open(self.runs_dir, name or "")
        except UserError:  # none is chosen, or it was renamed or deleted meanwhile
            return gr.skip(), gr.skip(), gr.skip()
        now = progress(folder), seen_of(folder)
        told, changed = now[0] != seen[0], now[1] != seen[1]
        return (
            now[0] if told else gr.skip(),
            found(folder) if changed else gr.skip(),
            now if told or changed else gr.skip(),
        )
