"""The tab to take a result away: the adapter, which every PEFT program loads on top of the original model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs import RunFolder
from lowmem_rmu.ui.guard import guarded

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
WORDS = """**The adapter** is the change that unlearning made, a small file. It needs the original model beside it:
`PeftModel.from_pretrained(model, "adapter")` puts it on. Whoever has both can also take it off again."""


class ExportTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        gr.Markdown(WORDS)
        self.run = gr.Dropdown([], label="Run", info="Runs that have finished unlearning.")
        self.pack_button = gr.Button("Pack the adapter", variant="primary", min_width=120)
        self.told = gr.Markdown()
        self.download = gr.DownloadButton("Download", interactive=False, min_width=120)

    def wire(self, *triggers: Callable[..., Any]) -> None:
        """Connects the events; the runs are read anew at `triggers`."""
        gr.on(triggers, guarded(self.refresh), [self.run], [self.run], **QUIET)
        self.pack_button.click(guarded(self.pack), [self.run], [self.told, self.download], api_visibility="private")

    def refresh(self, name: str | None) -> Any:
        names = [run.path.name for run in RunFolder.all(self.runs_dir) if run.adapter.exists()]
        return gr.update(choices=names, value=name if name in names else next(iter(names), None))

    def pack(self, name: str | None) -> tuple[str, Any]:
        if not name:
            raise UserError("Choose a run first.\nThere is none yet? Start one in the Unlearn tab.")
        content = packed(RunFolder.open(self.runs_dir, name))
        copy = save_bytes_to_cache(content, f"{name}-adapter.zip", self.download.GRADIO_CACHE)
        return f"{name}-adapter.zip, {len(content) / 1e6:,.1f} MB", gr.update(value=copy, interactive=True)


def packed(run: RunFolder) -> bytes:
    """The adapter as a zip file. Raises UserError where the run has none yet."""
    if not run.adapter.exists():
        raise UserError(f"Run {run.path.name} has no adapter yet.\nResume it, and wait until it has unlearned.")
    with TemporaryDirectory() as folder:
        return Path(shutil.make_archive(str(Path(folder) / "adapter"), "zip", run.adapter)).read_bytes()
