"""The tab to take a result away: what each format is for, the export as a separate process, and what
verifying it found.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from markupsafe import Markup

from lowmem_rmu.errors import UserError
from lowmem_rmu.export.formats import FORMATS, KINDS
from lowmem_rmu.export.verification import read_verification
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import failure, guarded
from lowmem_rmu.ui.markup import complaint, joined, paragraph, table

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
REFRESH_SECONDS = 2.0
FORMAT_WORDS = {
    "adapter": (
        "Adapter: the change alone, a small file. It is loaded on top of the original model, and can be "
        "removed again."
    ),
    "merged": (
        "Merged: the whole model with the change in it, for transformers, vLLM and others. As large as "
        "the original."
    ),
    "gguf": "GGUF: one file for llama.cpp, Ollama and LM Studio, and the change alone in a second one.",
}
KIND_WORDS = {
    "f16": "f16: nothing rounded that matters",
    "bf16": "bf16: as the original is stored",
    "q8_0": "q8_0: half as large, hardly rounded",
    "q4_0": "q4_0: a quarter as large, rounded most",
}
NOTHING = Markup("<p>Not exported yet.</p>")
LARGEST_DOWNLOAD = 200 * 2**20
"""Bytes of an export that is offered as a zip file; a larger one is taken from its folder."""


def place_of(folder: RunFolder, format: str, kind: str) -> Path:
    """Return where an export of the run lies. Raises UserError for an unknown format."""
    if format not in FORMATS or kind not in KINDS:
        raise UserError("Choose a format first.")
    return folder.exports / (f"gguf-{kind}" if format == "gguf" else format)


def output_of(place: Path) -> Path:
    """Return the file with the output of the export's process."""
    return place.with_name(f"{place.name}.txt")


def job_of(place: Path) -> str:
    """Return the name of the export among the jobs on its run."""
    return f"export-{place.name}"


def start(folder: RunFolder, format: str, kind: str, device: str) -> None:
    """Start the export's process. Raises UserError where the run has no adapter, or this export is there or
    under way already.
    """
    place = place_of(folder, format, kind)
    if not folder.adapter.exists():
        raise UserError(
            f"Run {folder.path.name} has no adapter yet.",
            "Resume it, and wait until it has unlearned.",
        )
    if place.exists():
        raise UserError(
            f"This export is there already, in {place}.",
            "Delete that folder to have it made again.",
        )
    command = [
        sys.executable,
        "-m",
        "lowmem_rmu",
        "export",
        str(folder.path.resolve()),
        "--to",
        str(place.resolve()),
        "--format",
        format,
    ]
    command += ["--gguf-type", kind, "--device", device]
    folder.exports.mkdir(exist_ok=True)
    with one_at_a_time(folder.path.parent):
        if jobs.is_exported_now(folder):
            raise UserError(f"Run {folder.path.name} is being exported already: wait until that is done.")
        output_of(place).unlink(missing_ok=True)
        jobs.begin(folder, job_of(place))
        jobs.spawn(folder.path.parent.resolve(), folder.export_name, command, output_of(place))


def progress(folder: RunFolder, place: Path) -> Markup:
    """Return the state of an export as HTML."""
    if place.exists():
        where = str(place.relative_to(folder.path.parent.parent))
        return joined(
            [paragraph("Done", f": {size_of(place) / 1e6:,.1f} MB in {where}"), verification_html(place)]
        )
    status = folder.read_job_status(job_of(place))
    if status is None:
        return NOTHING
    is_running = status.state in ("waiting", "running") and jobs.is_exported_now(folder)
    if is_running:
        return paragraph("At work", f": {jobs.doing(folder, folder.export_name, status)} …")
    return failure(status, "Do it again.")


def size_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def verification_html(place: Path) -> Markup:
    """Return the table of what the export answered, next to base and unlearned."""
    try:
        found = read_verification(place)
    except UserError as error:
        return complaint(str(error))
    if found is None:
        return Markup(
            "<p>It was not verified: the run asked no questions, or they cannot be asked again.</p>"
        )
    checked = joined(_checked(way) for way in found["checked"])
    return (
        Markup("<p>Asked the run's own questions: <strong>{}</strong>.</p>").format(found["mark"]) + checked
    )


def _checked(way: dict[str, Any]) -> Markup:
    """Render the verification of one way to load the export."""
    if way["mark"] is None:
        return Markup("<p>{}: not asked: {}</p>").format(way["name"], way["reason"])
    sides = ("base", "unlearned", "exported")
    rows = [
        (
            task["task"],
            *(f"{task[side]:.1%} ± {task[f'{side}_stderr']:.1%}" for side in sides),
            task["finding"],
        )
        for task in way["tasks"]
    ]
    return table(("Task", *sides, "Found"), rows, caption=f"{way['name']}: {way['mark']}")


@dataclass(frozen=True)
class Form:
    """What the tab's fields say is to be exported."""

    format: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.format} {self.kind}" if self.format == "gguf" else self.format


def forms() -> list[Form]:
    """Return every export that a run can have."""
    return [Form(format, kind) for format in FORMATS for kind in (KINDS if format == "gguf" else KINDS[:1])]


def last_form(folder: RunFolder) -> Form | None:
    """Return the format exported last, or being exported; None where there is none."""
    begun = []
    for form in forms():
        place = place_of(folder, form.format, form.kind)
        times = [path.stat().st_mtime for path in (place, output_of(place)) if path.exists()]
        begun += [(max(times), form)] if times else []
    return max(begun, key=lambda pair: pair[0])[1] if begun else None


def others_html(folder: RunFolder, shown: Path) -> Markup:
    """Return the run's other exports, so that none is made twice."""
    places = {form: place_of(folder, form.format, form.kind) for form in forms()}
    there = [form.name for form, place in places.items() if place.exists() and place != shown]
    return Markup("<p>Also exported: {}.</p>").format(", ".join(there)) if there else Markup("")


class ExportTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, runs_dir: Path, device: torch.device) -> None:
        self.runs_dir, self.device = runs_dir, device
        self.run = run_dropdown(label="Run", info="Runs that have finished unlearning.")
        formats, kinds = (
            [(words, key) for key, words in each.items()] for each in (FORMAT_WORDS, KIND_WORDS)
        )
        self.format = gr.Radio(formats, value="adapter", label="Format", elem_classes="rmu-presets")
        self.kind = gr.Radio(
            kinds, value="q8_0", label="How its numbers are stored", elem_classes="rmu-presets", visible=False
        )
        self.export_button = gr.Button("Export", variant="primary", min_width=120)
        self.told = gr.HTML(NOTHING)
        self.download = gr.DownloadButton("Download", interactive=False, min_width=120)
        self.seen, self.timer = gr.State(""), gr.Timer(REFRESH_SECONDS)

    def wire(self, *triggers: Callable[..., Any]) -> None:
        """Connect the events; the runs are read again at `triggers`."""
        chosen, shown = [self.run, self.format, self.kind], [self.told, self.download, self.seen]
        gr.on(triggers, guarded(self.refresh), [self.run], [self.run], **QUIET)
        self.format.change(guarded(self.show_kinds), [self.format], [self.kind], **QUIET)
        self.run.change(guarded(self.choose), [self.run], [self.format, self.kind], **QUIET)
        gr.on(
            [self.run.change, self.format.change, self.kind.change],
            guarded(self.show),
            chosen,
            shown,
            **QUIET,
        )
        self.export_button.click(guarded(self.start), chosen, shown, **QUIET)
        self.timer.tick(guarded(self.tick), [*chosen, self.seen], shown, queue=False, **QUIET)

    def refresh(self, name: str | None) -> Any:
        names = [run.path.name for run in RunFolder.all(self.runs_dir) if run.adapter.exists()]
        return offered(names, name)

    def choose(self, name: str | None) -> tuple[Any, Any]:
        """Turn the fields to what was exported last of a run; without such they stay as they are."""
        try:
            form = last_form(RunFolder.open(self.runs_dir, name or ""))
        except UserError:  # none is chosen, or it is gone: `show` says so
            form = None
        if form is None:
            return gr.skip(), gr.skip()
        return form.format, form.kind if form.format == "gguf" else gr.skip()

    def show_kinds(self, format: str) -> Any:
        return gr.update(visible=format == "gguf")

    def start(self, name: str | None, format: str, kind: str) -> tuple[str, Any, str]:
        if not name:
            raise UserError(
                "Choose a run first.",
                "There is none yet? Start one in the Unlearn tab.",
            )
        start(RunFolder.open(self.runs_dir, name), format, kind, self.device.type)
        return self.show(name, format, kind)

    def show(self, name: str | None, format: str, kind: str) -> tuple[str, Any, str]:
        """Return the state of the chosen export, its file to download, and what identifies both now."""
        if not name:
            return NOTHING, gr.update(value=None, interactive=False), NOTHING
        folder = RunFolder.open(self.runs_dir, name)
        place = place_of(folder, format, kind)
        return self._shown(folder, place, self._told(folder, place))

    def _told(self, folder: RunFolder, place: Path) -> Markup:
        return progress(folder, place) + others_html(folder, place)

    def _shown(self, folder: RunFolder, place: Path, told: str) -> tuple[str, Any, str]:
        nothing = gr.update(value=None, interactive=False)
        if not place.exists() or size_of(place) > LARGEST_DOWNLOAD:
            return told, nothing, told
        copy = save_bytes_to_cache(
            packed(place), f"{folder.path.name}-{place.name}.zip", self.download.GRADIO_CACHE
        )
        return told, gr.update(value=copy, interactive=True), told

    def tick(self, name: str | None, format: str, kind: str, seen: str) -> tuple[Any, ...]:
        """Update what has changed, and nothing else."""
        try:
            folder = RunFolder.open(self.runs_dir, name or "")
        except UserError:  # none is chosen, or it was renamed or deleted meanwhile
            return gr.skip(), gr.skip(), gr.skip()
        place = place_of(folder, format, kind)
        told = self._told(folder, place)
        return self._shown(folder, place, told) if told != seen else (gr.skip(), gr.skip(), gr.skip())


def packed(place: Path) -> bytes:
    """Return a folder as a zip file."""
    with TemporaryDirectory() as unfinished:
        return Path(shutil.make_archive(str(Path(unfinished) / "export"), "zip", place)).read_bytes()
