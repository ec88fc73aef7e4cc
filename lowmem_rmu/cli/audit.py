"""The verb `audit`: attack a run's model."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.progress import wait_for, watched
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.console import Console, print_json
from lowmem_rmu.runs.folder import RunFolder, present
from lowmem_rmu.runs.queue import turn
from lowmem_rmu.runs.status import StatusWriter, Stopped

if TYPE_CHECKING:
    from lowmem_rmu.audit.suite import Settings


def audit(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")
    ],
    attacks: Annotated[str, typer.Option(help="Which ones, with commas between them; all if left out.")] = "",
    budget: Annotated[
        float | None, typer.Option(min=0, help="Minutes it may take; what does not fit is named.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions per forgotten task at most; what --power takes if left out."),
    ] = None,
    power: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Probability to find what is gone; 0.8 with 100 to 300 questions per task.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what each attack will take; try nothing.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Discard what an earlier audit of the run found.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json.")] = False,
) -> None:
    """Attack a run's model: is what it forgot gone, or only hidden?"""
    quiet_libraries()
    with friendly_exit():
        # Heavy libraries load only once there is work for them.
        from lowmem_rmu.audit.suite import ATTACKS, Settings

        folder = RunFolder.open(run_folder.parent, run_folder.resolve().name)
        names = [name.strip() for name in attacks.split(",") if name.strip()] or list(ATTACKS)
        run_attacks(folder, names, budget, Settings(limit, seed), plan, again, device, as_json, power)


def run_attacks(
    folder: RunFolder,
    names: list[str],
    budget: float | None,
    settings: "Settings",
    plan: bool,
    again: bool,
    device: str,
    as_json: bool,
    power: float | None = None,
) -> None:
    """Run the attacks once the device is free. Print the cost estimate first, then the results.

    Everything is printed, and the status is written, before the device is given back: a process that sees
    the end of the job finds its outcome there.
    """
    from lowmem_rmu.audit.suite import Audit, open_audit
    from lowmem_rmu.audit.tables import audit_tables, cost_table
    from lowmem_rmu.evaluation.summary import note_audit
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.report.html import write_report

    chosen_device = resolve_device(device)
    chosen = Audit.choose(names)
    runs_dir = folder.path.parent.resolve()
    status_file = None if plan else folder.job_status("audit")
    try:
        with (
            watched(folder.path, "Audit") as watcher,
            turn(runs_dir, folder.audit_name, os.getpid(), wait_for(watcher, folder.path, "audit")),
            present(folder.path),
            StatusWriter(status_file, watcher) as status,
            TemporaryDirectory() as scratch,
        ):
            place = Path(scratch) if plan else None
            opened = open_audit(folder, chosen_device, settings, status, again, power, place)
            Console(stderr=True).print(cost_table([opened.estimate(attack) for attack in chosen]))
            if opened.power:
                print(opened.power.words, file=sys.stderr)
            if plan:
                return
            try:
                found = opened.run(chosen, None if budget is None else 60 * budget)
            finally:  # what was found until a stop is shown too
                if (folder.path / "summary.json").exists():
                    note_audit(folder)
                    write_report(folder)
            print_json(asdict(found)) if as_json else Console().print(audit_tables(found))
            print(f"Audited: {folder.audit_result}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        raise Stopped(folder.path, "the same command") from None
