"""The tab where a run begins: a preset, own text, settings and what they cost; and what the run is doing."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from markupsafe import escape

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.data.corpora import TEXT_FILES
from lowmem_rmu.data.documents import NAMES_SHOWN
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.advice import check_fits
from lowmem_rmu.memory.estimate import peak_of, plan
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.runs.queue import tickets
from lowmem_rmu.ui import jobs, live, offers
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import guarded, on_the_page
from lowmem_rmu.ui.markup import complaint
from lowmem_rmu.ui.tabs.chat import LoadedModel
from lowmem_rmu.ui.uploads import Own, describe, left_out_of, texts_among, with_own_text

DEFAULT = "tiny"
REFRESH_SECONDS = 1.5
PLOTS = ("Forget loss", "Retain loss", "Activation norm", "Divergence from base, nats per token")
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MATTER = {
    "rmu.steps": ("Steps", "How long it trains. More steps forget more, and may cost more of the rest."),
    "rmu.learning_rate": (
        "Learning rate",
        "How far a step goes. Too high, and everything breaks; too low, and nothing is forgotten.",
    ),
    "alpha": (
        "Protection (alpha)",
        "How strongly all other knowledge is held in place. Empty: what the preset says for each topic.",
    ),
    "rmu.rank": (
        "Rank",
        "How much of the model may change. Larger: more room to forget in, a little more memory.",
    ),
    "evaluation.limit": ("Questions a test", "Fewer are faster and less certain. Empty: all of them."),
    "rmu.seed": ("Seed", "Where chance begins. The same seed gives the same run."),
}
"""Settings by dotted path: what the page calls them, and a sentence."""
WHOLE = ("rmu.steps", "rmu.rank", "rmu.seed")
MAY_BE_EMPTY = {"alpha": "as the preset says", "evaluation.limit": "all"}
"""Settings that need no value, and what that means. They are text fields: the page shows, and sends, an unset
number as 0.
"""


@dataclass(frozen=True)
class Unlearning:
    """Where runs go, and what they share the device with."""

    runs_dir: Path
    device: torch.device
    chat_model: LoadedModel

    def start(self, preset_name: str, preset: Preset, own: Own, name: str) -> RunFolder:
        """Check everything, then start the run's process. Raises UserError; nothing is left behind then."""
        if not tickets(self.runs_dir):  # else it waits, and looks again once its turn has come
            spec = ModelSpec.of_preset(preset)
            self.chat_model.make_room(peak_of(plan(preset, spec, self.device)), self.device)
            check_fits(preset, spec, self.device, STAGES)
        folder = jobs.reserve(self.runs_dir, preset_name, name.strip() or None)
        try:
            jobs.start(folder, preset_name, with_own_text(preset, own, folder), self.device.type)
        except BaseException:
            jobs.delete(folder)
            raise
        return folder


def values_of(preset: Preset) -> list[Any]:
    """Return the values of the fields, in the order of MATTER."""
    alphas = {topic.alpha for topic in preset.topics.values()}
    settings = {"alpha": alphas.pop() if len(alphas) == 1 else None}
    settings |= {
        f"{section}.{key}": value
        for section in ("rmu", "evaluation")
        for key, value in getattr(preset, section)
    }
    return [_as_text(settings[path]) if path in MAY_BE_EMPTY else settings[path] for path in MATTER]


def _as_text(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def changes_of(preset_name: str, values: list[Any]) -> dict[str, Any]:
    """Return the fields that differ from the preset, by dotted path."""
    preset = load_preset(preset_name)
    given = {
        path: (value or "").strip() if path in MAY_BE_EMPTY else value
        for path, value in zip(MATTER, values, strict=True)
    }
    changed = {
        path: given[path] for path, old in zip(MATTER, values_of(preset), strict=True) if given[path] != old
    }
    if alpha := changed.pop("alpha", None):
        changed |= {f"topics.{topic}.alpha": alpha for topic in preset.topics}
    if changed.get("evaluation.limit") == "":
        changed["evaluation.limit"] = None
    return {
        path: int(value) if path in WHOLE and value is not None and float(value).is_integer() else value
        for path, value in changed.items()
    }


def labels_of(changes: dict[str, Any]) -> dict[str, str]:
    """Return the labels of the changed fields by dotted path; one field may change several topics."""
    return {path: MATTER[path if path in MATTER else path.rpartition(".")[2]][0] for path in changes}


def chosen_by(preset_name: str, lines: str, values: list[Any]) -> Preset:
    """Return the preset as the fields and the lines of the page have it. Raises UserError."""
    changes = changes_of(preset_name, values) if preset_name else {}
    return offers.chosen(preset_name, changes, lines, labels_of(changes))


class UnlearnTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, unlearning: Unlearning) -> None:
        self.unlearning, self.runs_dir, self.device = unlearning, unlearning.runs_dir, unlearning.device
        self._add_presets()
        self._add_texts()
        self._add_settings()
        self._add_live()

    def _add_presets(self) -> None:
        gr.Markdown(
            "**1. What is to be forgotten?** `tiny` is a model of our own that runs anywhere in a "
            "minute: begin with it."
        )
        choices = [(offers.label(offer, self.device), offer.name) for offer in offers.offers(self.device)]
        self.preset = gr.Radio(choices, value=DEFAULT, label="Preset", elem_classes="rmu-presets")
        with gr.Accordion("All presets, what they need, and why they fit or not", open=False):
            self.table = gr.HTML(offers.table_html(self.device))

    def _add_texts(self) -> None:
        with gr.Accordion("2. Your own text (optional)", open=False):
            gr.Markdown(
                "Text about what is to be forgotten, and text that stands for all that must stay: "
                "`.txt`, `.md`, `.jsonl`, up to 50 MB."
            )
            self.topic = gr.Textbox(
                "",
                label="What is your text about?",
                placeholder="for example: tropical cyclones",
                max_length=100,
            )
            with gr.Row():
                self.forget, self.forget_shown = self._drop("To be forgotten")
                self.retain, self.retain_shown = self._drop("To be kept")

    def _drop(self, label: str) -> tuple[gr.File, gr.HTML]:
        with gr.Column(min_width=260):
            files, shown = (
                gr.File(label=label, file_count="multiple", file_types=list(TEXT_FILES), height=140),
                gr.HTML(),
            )
            folder = gr.UploadButton(f"{label}: a whole folder", file_count="directory", size="sm")
            folder.upload(guarded(self.take_folder), [folder], [files], **QUIET)
            return files, shown

    def _add_settings(self) -> None:
        values = dict(zip(MATTER, values_of(load_preset(DEFAULT)), strict=True))
        with gr.Accordion("3. Settings", open=False):
            with gr.Row():
                self.fields = [
                    gr.Textbox(
                        values[path], label=name, info=info, placeholder=MAY_BE_EMPTY[path], min_width=220
                    )
                    if path in MAY_BE_EMPTY
                    else gr.Number(values[path], label=name, info=info, min_width=220)
                    for path, (name, info) in MATTER.items()
                ]
            self.name = gr.Textbox(
                "",
                label="Name of the run",
                info="Letters, digits, dots, dashes. Empty: the preset and the time.",
                max_length=100,
            )
            with gr.Accordion("All other settings", open=False):
                self.lines = gr.Textbox(
                    "",
                    label="One a line, as key=value",
                    lines=3,
                    placeholder=("rmu.batch_size=2\nmodel.quantisation=none"),
                    info="The keys are those of the preset files, described in lowmem_rmu/config/schema.py.",
                )
        with gr.Accordion("Memory it will take", open=True):
            self.plan = gr.HTML(offers.plan_html(load_preset(DEFAULT), self.device))

    def _add_live(self) -> None:
        with gr.Row():
            self.start_button = gr.Button("Start", variant="primary", min_width=120)
            self.stop_button = gr.Button("Stop", variant="stop", min_width=120)
            self.resume_button = gr.Button("Resume", min_width=120)
        self.run = run_dropdown(
            label="Run shown", info="You can close this page. The run continues and will be listed here."
        )
        self.progress = gr.HTML("<p>No run yet.</p>")
        with gr.Row():
            self.plots = [self._plot(title) for title in PLOTS]
        self.seen = gr.State(("", []))
        self.timer = gr.Timer(REFRESH_SECONDS)

    def _plot(self, title: str) -> gr.LinePlot:
        return gr.LinePlot(
            x="step",
            y="value",
            color="line",
            title=title,
            height=220,
            min_width=260,
            x_title="Step",
            y_title="",
        )

    def wire(self, load: Callable[..., Any]) -> None:
        """Connect the events; `load` is that of the page."""
        settings: list[Any] = [self.preset, self.lines, *self.fields]
        shown = [self.progress, *self.plots, self.run, self.seen]
        self.preset.change(
            guarded(lambda name: values_of(load_preset(name))), [self.preset], self.fields, **QUIET
        )
        gr.on(
            [each.change for each in settings],
            guarded(self.show_plan),
            settings,
            [self.plan],
            trigger_mode="always_last",
            **QUIET,
        )
        for files, what, told in (
            (self.forget, "the forget set", self.forget_shown),
            (self.retain, "the retain set", self.retain_shown),
        ):
            files.change(guarded(self._describer(what)), [files, self.preset], [told], **QUIET)
        given = [self.preset, self.lines, self.name, self.forget, self.retain, self.topic, *self.fields]
        self.start_button.click(guarded(self.start), given, [self.run], **QUIET)
        self.stop_button.click(guarded(self.stop), [self.run], [], **QUIET)
        self.resume_button.click(guarded(self.resume), [self.run], [], **QUIET)
        self.run.change(guarded(self.show), [self.run], shown, queue=False, **QUIET)
        self.progress.change(
            guarded(self.buttons), [self.run], [self.stop_button, self.resume_button], queue=False, **QUIET
        )
        self.timer.tick(guarded(self.tick), [self.run, self.seen], shown, queue=False, **QUIET)
        gr.on([load, self.run.focus], guarded(self.refresh), [self.run], [self.run], queue=False, **QUIET)

    def show_plan(self, preset_name: str, lines: str, *values: Any) -> str:
        """Show a mistake in the plan's place: nobody wants a message for every key."""
        try:
            return offers.plan_html(chosen_by(preset_name, lines, list(values)), self.device)
        except UserError as error:
            return complaint(on_the_page(error))

    def take_folder(self, files: list[str]) -> list[str]:
        """Return the files of a folder that are read; says which are not."""
        found, left_out = texts_among(files), left_out_of(files)
        if left_out:
            gr.Info(
                "Left out: "
                + ", ".join(
                    f"{escape(name)} ({reason})" for name, reason in list(left_out.items())[:NAMES_SHOWN]
                )
            )
        return found

    def _describer(self, what: str) -> Callable[[list[str] | None, str], str]:
        return lambda files, preset_name: describe(files, load_preset(preset_name), what)

    def start(
        self,
        preset_name: str,
        lines: str,
        name: str,
        forget: list[str] | None,
        retain: list[str] | None,
        topic: str,
        *values: Any,
    ) -> Any:
        if forget and not topic.strip():
            raise UserError("Say in a word or two what your text is about.")
        own = Own(forget or [], retain or [], topic)
        preset = chosen_by(preset_name, lines, list(values))
        folder = self.unlearning.start(preset_name, preset, own, name)
        return gr.update(choices=jobs.names(self.runs_dir), value=folder.path.name)

    def stop(self, name: str | None) -> None:
        jobs.stop(jobs.find(self.runs_dir, name))
        gr.Info("It stops after its step. Nothing is lost: Resume continues it.")

    def resume(self, name: str | None) -> None:
        jobs.resume(jobs.find(self.runs_dir, name))

    def buttons(self, name: str | None) -> tuple[Any, Any]:
        """Stop is there for a run under way, Resume for one that can go on."""
        with suppress(UserError):  # none is chosen, or it is gone
            state = jobs.state_of(jobs.find(self.runs_dir, name))
            return gr.update(interactive=state.is_live), gr.update(interactive=live.can_go_on(state))
        return gr.update(interactive=False), gr.update(interactive=False)

    def refresh(self, name: str | None) -> Any:
        """Return the runs there are; without one chosen, that which is under way or else the newest."""
        return offered(jobs.names(self.runs_dir), name)

    def show(self, name: str | None) -> tuple[Any, ...]:
        """Return the state of the chosen run, the list of runs, and what identifies both now."""
        return self._shown(name, *self._now(name))

    def tick(self, name: str | None, seen: tuple[str, list[str]]) -> tuple[Any, ...]:
        """Update what has changed, and nothing else; no chart is drawn otherwise."""
        told, folder, names = self._now(name)
        if (told, names) == tuple(seen):
            return (gr.skip(),) * (len(self.plots) + 3)
        return self._shown(name, told, folder, names)

    def _now(self, name: str | None) -> tuple[str, RunFolder | None, list[str]]:
        """Return the run shown in words, its folder where it is there, and the names of all runs."""
        return *self._told(name), jobs.names(self.runs_dir)

    def _shown(
        self, name: str | None, told: str, folder: RunFolder | None, names: list[str]
    ) -> tuple[Any, ...]:
        return told, *live.curves(folder), offered(names, name), (told, names)

    def _told(self, name: str | None) -> tuple[str, RunFolder | None]:
        if not name:
            return "<p>No run yet.</p>", None
        try:
            folder = jobs.find(self.runs_dir, name)
        except UserError:
            return "<p>This run is no longer there.</p>", None
        return live.progress(jobs.state_of(folder), folder), folder
