"""The verb `export`: write a run's model for other programs."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.progress import wait_for, watched
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.console import Console
from lowmem_rmu.errors import UserError, command_line
from lowmem_rmu.runs.folder import RunFolder, present
from lowmem_rmu.runs.queue import turn
from lowmem_rmu.runs.status import StatusWriter, Stopped

if TYPE_CHECKING:
    from lowmem_rmu.export.formats import Wanted


def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")
    ],
    to: Annotated[Path, typer.Option(help="The folder to write: a new or an empty one.")],
    format_: Annotated[
        Literal["adapter", "merged", "gguf"],
        typer.Option(
            "--format", help="adapter alone, merged into the whole model, or as GGUF for llama.cpp."
        ),
    ] = "merged",
    kind: Annotated[
        Literal["f16", "bf16", "q8_0", "q4_0"],
        typer.Option("--gguf-type", help="How a GGUF file stores its matrices."),
    ] = "q8_0",
    base: Annotated[
        Literal["original", "dequantised"],
        typer.Option(help="Merge into the checkpoint, or into the 4-bit weights that were trained on."),
    ] = "original",
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the files that stay as they are, too; without it they are links."),
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Load what was written and ask it the run's questions.")
    ] = True,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload it to the Hub, where only you can read it."),
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Let everybody read what --push uploads, the run's own texts in reproduce/ too."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Where it is verified: auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Write a run's model for other programs, and ask what was written whether it has forgotten too."""
    quiet_libraries()
    with friendly_exit():
        from lowmem_rmu.export.formats import Wanted  # heavy libraries load only once there is work for them
        from lowmem_rmu.export.push import check_name
        from lowmem_rmu.export.push import push as upload

        if push:
            check_name(push)
        folder = RunFolder.open(run_folder.parent, run_folder.resolve().name)
        mark = write_export(folder, Wanted(format_, base, kind, not copy, verify), to, device)
        if push and mark in ("the update did not survive", "damaged"):
            upload_command = command_line("hf", "upload", push, to)
            raise UserError(
                f"Not uploaded: {mark}.",
                f"If you want it to be there all the same: {upload_command}",
            )
        if push:
            print(f"Uploaded: {upload(to, push, private=not public)}")


def write_export(folder: RunFolder, wanted: "Wanted", to: Path, device: str) -> str | None:
    """Wait for its turn, for verifying takes the device; then print what was done and found, and give the
    mark.
    """
    from lowmem_rmu.evaluation.multiple_choice import Interrupted
    from lowmem_rmu.export.formats import export as write
    from lowmem_rmu.export.verification import verification_tables
    from lowmem_rmu.measure import followed
    from lowmem_rmu.model.loading import resolve_device

    # Exports into the run's own folder are the page's, which follows them by their status.
    is_followed = to.resolve().parent == folder.exports.resolve()
    status_file = folder.job_status(f"export-{to.name}") if is_followed else None
    chosen_device = resolve_device(device)
    runs_dir = folder.path.parent.resolve()
    try:
        with (
            watched(to, "Export") as watcher,
            turn(runs_dir, folder.export_name, os.getpid(), wait_for(watcher, folder.path, "export")),
            present(folder.path),
            StatusWriter(status_file, watcher, stage="write") as status,
        ):
            exported = write(folder, wanted, to, chosen_device, partial(followed, status))
    except (KeyboardInterrupt, Interrupted):
        raise Stopped(folder.path, "the same command. (Of the export nothing was left.)") from None
    for sentence in exported.sentences:
        Console().print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    if exported.verification:
        Console().print(verification_tables(exported.verification))
    Console().print(f"Exported: {to}", highlight=False, markup=False, soft_wrap=True)
    return exported.verification.mark if exported.verification else None
