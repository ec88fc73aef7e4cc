"""The verb `run`: the main job."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.plan import print_left_out, print_plan
from lowmem_rmu.cli.presets import presets_table
from lowmem_rmu.cli.progress import show_waiting, watched
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.cli.tables import accuracy_table, text_table
from lowmem_rmu.config.loading import find_preset, load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.console import Console, print_json
from lowmem_rmu.errors import UserError, command_line, nearest
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import STAGES, RunFolder, present
from lowmem_rmu.runs.queue import (
    check_free,
    free_name,
    one_at_a_time,
    process_of,
    take_ticket,
    turn,
    world_size,
)
from lowmem_rmu.runs.recorded import differences, read_preset
from lowmem_rmu.runs.status import Stopped


def run(
    preset: Annotated[
        str | None, typer.Argument(help="The name of a preset (see --list), or the path of a YAML file.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting; may be given again."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders are kept.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="The run's name; the preset and the time if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    stages: Annotated[
        str, typer.Option(help="Which stages to go through, with commas between them.")
    ] = ",".join(STAGES),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run --name, or with the newest one of this preset."),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Print what would be loaded, downloaded and trained, and the memory; load nothing."
        ),
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Load a model in 4-bit, measure it, make it forget, measure it again and write a report."""
    quiet_libraries()
    with friendly_exit():
        if list_:
            Console().print(presets_table())
            return
        if preset is None:
            raise UserError(
                "Which preset? For example: python -m lowmem_rmu.run tiny",
                "See them all with --list.",
            )
        chosen = load_preset(preset, set_)
        wanted = parse_stages(stages)
        if plan:
            print_plan(chosen, device, wanted)
            return
        folder = main_job(find_preset(preset).stem, chosen, runs_dir, name, device, wanted, resume)
        if folder:
            print_summary(folder, as_json)


def parse_stages(text: str) -> list[str]:
    """Return the stages in their own order, whatever order they are named in."""
    named = [stage.strip() for stage in text.split(",") if stage.strip()]
    for stage in named:
        if stage not in STAGES:
            raise UserError(f'There is no stage "{stage}". {nearest(stage, STAGES)}')
    if not named:
        raise UserError(f"--stages names no stage. There is: {', '.join(STAGES)}.")
    return [stage for stage in STAGES if stage in named]


def main_job(
    preset_name: str,
    preset: Preset,
    runs_dir: Path,
    name: str | None,
    device: str,
    stages: list[str],
    resume: bool,
) -> RunFolder | None:
    """Go through the stages in a new run folder, or resume an old one, once the device is free.

    Returns None in the other processes of `accelerate launch`, which take their share of the questions only.
    """
    existing = find_run(runs_dir, name, preset_name, preset) if resume else None
    with device_turn(runs_dir, name, preset_name, existing) as path:
        # A run that waits for its turn stays small: the heavy libraries load only now.
        from lowmem_rmu.distributed import Distributed
        from lowmem_rmu.evaluation.workers import work
        from lowmem_rmu.inputs import read_inputs
        from lowmem_rmu.memory.advice import check_fits
        from lowmem_rmu.model.loading import resolve_device
        from lowmem_rmu.model.spec import ModelSpec
        from lowmem_rmu.pipeline import RunContext, is_done, run_config, run_stages
        from lowmem_rmu.runs.status import StatusWriter

        if existing is not None:
            # The model may have a new commit on the Hub since the run began.
            preset = read_preset(existing)
        spec = ModelSpec.of_preset(preset)
        distributed = Distributed()
        chosen_device = resolve_device(distributed.device(device))
        if not distributed.is_main_process:
            inputs = read_inputs(preset, spec, stages)
            work(spec, inputs.questions, chosen_device, distributed)
            return None

        # Refuse what cannot work before anything is loaded or written.
        remaining = [stage for stage in stages if existing is None or not is_done(existing, stage)]
        check_fits(preset, spec, chosen_device, remaining)
        inputs = read_inputs(preset, spec, stages)
        print_left_out(inputs.sources)

        folder = existing
        if folder is None:
            config = run_config(preset_name, preset, chosen_device, inputs.sources)
            # Until it has its config.json, the folder looks like that of a killed start.
            with one_at_a_time(runs_dir):
                folder = RunFolder.create(runs_dir, path.name)
                write_json(folder.path / "config.json", config)
        with present(folder.path), watched(folder.path) as watcher:
            status = StatusWriter(folder.path / "status.json", watcher, folder.path / "stop")
            run_stages(RunContext(preset, spec, folder, inputs, chosen_device, stages, status, distributed))
        return folder


@contextmanager
def device_turn(
    runs_dir: Path, name: str | None, preset_name: str, existing: RunFolder | None
) -> Iterator[Path]:
    """Choose the folder of a run and wait until the device is free. Yields the folder's path.

    Raises UserError for a name that is taken and a run that is under way, and Stopped where a stop was
    requested meanwhile.
    """
    if world_size() > 1:  # the processes of `accelerate launch` must not wait for each other
        yield existing.path if existing else new_path(runs_dir, name, preset_name)
        return
    with one_at_a_time(runs_dir):
        path = existing.path if existing else new_path(runs_dir, name, preset_name)
        process = process_of(runs_dir, path.name)
        if process and process.pid != os.getpid():
            raise UserError(
                f"Run {path} is under way already, in process {process.pid}.",
                "Wait until it has ended, or stop it first.",
            )
        take_ticket(runs_dir, path.name, os.getpid())
    forget_old_stop(path / "stop")
    waiting = Waiting(path)
    with refusals_noted(path), turn(runs_dir, path.name, os.getpid(), waiting.tell):
        waiting.check_stop()  # all runs before it may have ended since the last look
        yield path


def new_path(runs_dir: Path, name: str | None, preset_name: str) -> Path:
    """Return where a new run goes: by `name`, or by the preset's name and the time. Within `one_at_a_time`.

    Raises UserError for a name that is taken, or that leaves `runs_dir`.
    """
    if name is None:
        return runs_dir / free_name(runs_dir, RunFolder.new_name(preset_name))
    check_free(runs_dir, name)
    return runs_dir / name


def forget_old_stop(stop: Path) -> None:
    """Remove the request to stop of an earlier process. One that was made since this process started
    counts.
    """
    with suppress(OSError):
        if stop.stat().st_mtime < psutil.Process().create_time():
            stop.unlink()


class Waiting:
    """What a run does while others come first: show which, whenever that changes, and stop when asked to."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        printed = partial(print, file=sys.stderr, flush=True)
        self._show = show_waiting(printed, f"in {path.parent} before this run")

    def check_stop(self) -> None:
        """Raise Stopped where a stop was asked for before the run's turn came."""
        if self.folder.stop_asked:
            self.folder.write_status("queue", 0, 0, "stopped")
            raise Stopped(self.folder.path)

    def tell(self, before: list[str]) -> None:
        """Show the runs that come before this one. Raises Stopped."""
        self.check_stop()
        self._show(before)


@contextmanager
def refusals_noted(path: Path) -> Iterator[None]:
    """Why a run of the app could not begin, or not go on, stays in its folder: the app has written there that
    it waits.
    """
    try:
        yield
    except UserError as error:
        status = RunFolder(path).read_status()
        if status is not None and status.state == "waiting":
            RunFolder(path).write_status("prepare", 0, 0, "failed", error)
        raise


def find_run(runs_dir: Path, name: str | None, preset_name: str, preset: Preset) -> RunFolder:
    """Return the run to go on with. Raises UserError where there is none, or where its settings are
    others.
    """
    if name is None:
        presets = {run: _preset_named_in(run) for run in RunFolder.all(runs_dir)}
        runs = [run for run, named in presets.items() if named == preset_name]
        if not runs:
            damaged = [str(run.path) for run, named in presets.items() if named is None]
            also = f" The config.json of {', '.join(damaged)} is damaged." if damaged else ""
            raise UserError(
                f"There is no run of {preset_name} in {runs_dir} to go on with.{also}",
                "Start one without --resume.",
            )
        folder = runs[0]
    else:
        folder = RunFolder.open(runs_dir, name)
    started_with = read_preset(folder, pinned=False)
    different = sorted(differences(started_with.model_dump(), preset.model_dump()))
    if different:
        raise UserError(
            f"Run {folder.path} was started with other settings: {', '.join(different)}.",
            "Give the same preset and --set, or start a new run without --resume.",
        )
    return folder


def _preset_named_in(run: RunFolder) -> str | None:
    """None where the run's config.json is damaged."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(run.config["preset"])
    return None


def print_summary(folder: RunFolder, as_json: bool) -> None:
    """Print the tables and the verdict, or the summary as JSON."""
    # Heavy libraries load only once there is work for them.
    from lowmem_rmu.evaluation.summary import NOT_AUDITED, Headline

    path = folder.path / "summary.json"
    if not path.exists():
        print(f"Done: {folder.path}", file=sys.stderr)
        return
    from lowmem_rmu.evaluation.summary import read_summary

    summary = read_summary(folder)
    if as_json:
        print_json(asdict(summary))
        return
    console = Console()
    if summary.rows:
        console.print(accuracy_table(summary.rows, summary.unasked))
    if summary.texts:
        console.print(text_table(summary.texts))
    headline = Headline.of(folder, summary.verdict)
    for sentence in [*summary.notes, *summary.verdict.sentences]:
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{headline.sentence}", highlight=False, style="bold")
    if headline.audit == NOT_AUDITED and headline.forgotten not in ("no", "unknown"):
        command = f"python -m lowmem_rmu audit {folder.path}"
        console.print(f"Gone, or only hidden? {command}", highlight=False, soft_wrap=True)
    console.print(f"Report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    chat = command_line("python", "-m", "lowmem_rmu", "chat", folder.path)
    console.print(f"Talk to both: {chat}", highlight=False, markup=False, soft_wrap=True)
