"""`python -m lowmem_rmu.run PRESET`: the main job from the command line."""

import logging
import os
import signal
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from lowmem_rmu.console import Console, prepare_streams, print_json, printable
from lowmem_rmu.errors import UserError, command_line, nearest
from lowmem_rmu.presets import Preset, differences, find_preset, load_preset, preset_names, preset_of_run, recorded_preset
from lowmem_rmu.runs import STAGES, RunFolder, Stopped, present, write_json
from lowmem_rmu.turns import check_free, free_name, one_at_a_time, process_of, take_ticket, turn, world_size

if TYPE_CHECKING:
    from lowmem_rmu.data.sources import Sources

PLAIN_SECONDS = 5.0  # between two progress lines where the output is no terminal
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class Interrupts:
    """The first Ctrl-C (or SIGTERM) asks the run to stop after its step; the second ends it at once.

    A closed terminal (SIGHUP) asks as the first Ctrl-C does, however often it is sent; nohup works as usual.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            before[hangup] = signal.signal(hangup, self._hang_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("Stopping after this step; once more to stop at once.", file=sys.stderr)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        # A terminal is closed by now or will be in a moment: printing to it would fail.
        # Files and pipes still take what is printed.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            with suppress(OSError):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Bars:
    """Live progress in a terminal."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        # On a narrow terminal the figures are cut, not the counts.
        name = TextColumn("{task.description}", markup=False, table_column=Column(min_width=18, no_wrap=True))
        count, left = MofNCompleteColumn(table_column=Column(min_width=9)), TimeRemainingColumn(table_column=Column(min_width=7))
        figures = TextColumn(
            "{task.fields[figures]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        )
        self.progress = Progress(name, BarColumn(bar_width=10), count, left, figures, console=console, expand=True)
        self.interrupts = interrupts
        self.task = TaskID(0)
        self.stage = ""

    def started(self, stage: str, total: int) -> None:
        if self.stage != stage:
            self.stage, self.task = stage, self.progress.add_task(stage, total=None, figures="")
        self.progress.update(self.task, total=total or None)

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        self.progress.update(self.task, completed=done, figures=_words(figures))

    def noted(self, sentence: str) -> None:
        self.progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def asks_to_stop(self) -> bool:
        return self.interrupts.asked

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class Lines:
    """Plain lines, a few a minute, where the output is no terminal."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        self.console, self.interrupts = console, interrupts
        self.stage, self.total, self.began, self.last = "", 0, 0.0, 0.0

    def started(self, stage: str, total: int) -> None:
        if stage != self.stage:
            self._print(f"{stage} ...")
        self.stage, self.total, self.began, self.last = stage, total, time.monotonic(), time.monotonic()

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        now = time.monotonic()
        if not self.total:  # nobody knows how many there will be: what comes next is told before it begins
            self._print(f"{self.stage}: {_words(figures)}")
        elif done and (now - self.last >= PLAIN_SECONDS or done == self.total):
            left = (now - self.began) / done * (self.total - done)
            self._print(f"{self.stage} {done}/{self.total}  {_words(figures)}  about {left:.0f} s left")
            self.last = now

    def noted(self, sentence: str) -> None:
        self._print(sentence)

    def asks_to_stop(self) -> bool:
        return self.interrupts.asked

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def watched(folder: Path, called: str = "Run folder") -> Iterator[Bars | Lines]:
    """Shows on stderr how far the work in a folder is, and hears Ctrl-C."""
    console, interrupts = Console(stderr=True), Interrupts()
    console.print(f"{called}: {folder}", highlight=False, soft_wrap=True)
    with interrupts.watched(), (Bars if console.is_terminal else Lines)(console, interrupts) as watcher:
        yield watcher


def _words(figures: dict[str, float | str]) -> str:
    return "  ".join(f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else str(value) for key, value in figures.items())


def run(
    preset: Annotated[str | None, typer.Argument(help="The name of a preset (see --list), or the path of a YAML file.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting; may be given again.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders are kept.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="The run's name; the preset and the time if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    stages: Annotated[str, typer.Option(help="Which stages to go through, with commas between them.")] = ",".join(STAGES),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run --name, or with the newest one of this preset.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be loaded, downloaded and trained, and the memory; load nothing.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Loads a model in 4-bit, measures it, makes it forget, measures it again and writes a report."""
    quiet_libraries()
    with friendly_exit():
        if list_:
            Console().print(presets_table())
            return
        if preset is None:
            raise UserError("Which preset? For example: python -m lowmem_rmu.run tiny\nSee them all with --list.")
        chosen = load_preset(preset, set_)
        wanted = parse_stages(stages)
        if plan:
            print_plan(chosen, device, wanted)
            return
        folder = main_job(find_preset(preset).stem, chosen, runs_dir, name, device, wanted, resume)
        if folder:
            print_summary(folder, as_json)


def parse_stages(text: str) -> list[str]:
    """The stages in their own order, whatever order they are named in."""
    named = [stage.strip() for stage in text.split(",") if stage.strip()]
    for stage in named:
        if stage not in STAGES:
            raise UserError(f'There is no stage "{stage}". {nearest(stage, STAGES)}')
    if not named:
        raise UserError(f"--stages names no stage. There is: {', '.join(STAGES)}.")
    return [stage for stage in STAGES if stage in named]


def main_job(
    preset_name: str, preset: Preset, runs_dir: Path, name: str | None, device: str, stages: list[str], resume: bool
) -> RunFolder | None:
    """Go through the stages in a new run folder, or resume an old one, once the device is free.

    Returns None in the other processes of `accelerate launch`, which take their share of the questions only.
    """
    # Heavy libraries load only once there is work for them.
    from lowmem_rmu.distributed import Distributed
    from lowmem_rmu.evaluation.workers import work
    from lowmem_rmu.inputs import read_inputs
    from lowmem_rmu.model.fit import check_fits
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.pipeline import RunContext, is_done, run_config, run_stages
    from lowmem_rmu.status import StatusWriter

    existing = find_run(runs_dir, name, preset_name, preset) if resume else None
    with device_turn(runs_dir, name, preset_name, existing) as path:
        if existing is not None:
            # The model may have a new commit on the Hub since the run began.
            preset = preset_of_run(existing.config, existing.path)
        distributed = Distributed()
        chosen_device = resolve_device(distributed.device(device))
        if not distributed.is_main_process:
            inputs = read_inputs(preset, stages)
            work(preset, inputs.tokenizer, inputs.questions, chosen_device, distributed)
            return None

        # Refuse what cannot work before anything is loaded or written.
        remaining = [stage for stage in stages if existing is None or not is_done(existing, stage)]
        check_fits(preset, chosen_device, remaining)
        inputs = read_inputs(preset, stages)
        print_left_out(inputs.sources)

        folder = existing
        if folder is None:
            config = run_config(preset_name, preset, chosen_device, inputs.sources)
            # Until it has its config.json, the folder looks like that of a killed start.
            with one_at_a_time(runs_dir):
                folder = RunFolder.create(runs_dir, path.name)
                write_json(folder.path / "config.json", config)
        with present(folder.path), watched(folder.path) as watcher:
            status = StatusWriter(folder, watcher)
            run_stages(RunContext(preset, folder, inputs, chosen_device, stages, status, distributed))
        return folder


@contextmanager
def device_turn(runs_dir: Path, name: str | None, preset_name: str, existing: RunFolder | None) -> Iterator[Path]:
    """Choose the folder of a run and wait until the device is free. Yields the folder's path.

    Raises UserError for a name that is taken and a run that is under way, and Stopped where a stop was requested meanwhile.
    """
    if world_size() > 1:  # the processes of `accelerate launch` must not wait for each other
        yield existing.path if existing else new_path(runs_dir, name, preset_name)
        return
    with one_at_a_time(runs_dir):
        path = existing.path if existing else new_path(runs_dir, name, preset_name)
        process = process_of(runs_dir, path.name)
        if process and process.pid != os.getpid():
            raise UserError(
                f"Run {path} is under way already, in process {process.pid}.\n"
                "Wait until it has ended, or stop it first."
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
    """A stop that was asked for since this process started counts; an older one was for the process before it."""
    with suppress(OSError):
        if stop.stat().st_mtime < psutil.Process().create_time():
            stop.unlink()


class Waiting:
    """What a run does while others come first: says so when their number changes, and hears when it is to stop."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, list[str]()

    def check_stop(self) -> None:
        """Raise Stopped where a stop was asked for before the run's turn came."""
        if (self.path / "stop").exists():
            RunFolder(self.path).write_status("queue", 0, 0, "stopped")
            raise Stopped(self.path)

    def tell(self, before: list[str]) -> None:
        self.check_stop()
        if before != self.before:
            self.before = before
            print(f"Waiting: {', '.join(before)} in {self.path.parent} before this run.", file=sys.stderr, flush=True)


@contextmanager
def refusals_noted(path: Path) -> Iterator[None]:
    """Why a run of the app could not begin, or not go on, stays in its folder: the app has written there that it waits."""
    try:
        yield
    except UserError as error:
        if RunFolder(path).read_status().get("state") == "waiting":
            RunFolder(path).write_status("prepare", 0, 0, "failed", str(error))
        raise


def find_run(runs_dir: Path, name: str | None, preset_name: str, preset: Preset) -> RunFolder:
    """The run to go on with. Raises UserError where there is none, or where its settings are others."""
    if name is None:
        presets = {run: _preset_named_in(run) for run in RunFolder.all(runs_dir)}
        runs = [run for run, named in presets.items() if named == preset_name]
        if not runs:
            damaged = [str(run.path) for run, named in presets.items() if named is None]
            also = f" The config.json of {', '.join(damaged)} is damaged." if damaged else ""
            raise UserError(
                f"There is no run of {preset_name} in {runs_dir} to go on with.{also}\n"
                "Start one without --resume."
            )
        folder = runs[0]
    else:
        folder = RunFolder.open(runs_dir, name)
    started_with = recorded_preset(folder.config["settings"], folder.path)
    different = sorted(differences(started_with.model_dump(), preset.model_dump()))
    if different:
        raise UserError(
            f"Run {folder.path} was started with other settings: {', '.join(different)}.\n"
            "Give the same preset and --set, or start a new run without --resume."
        )
    return folder


def _preset_named_in(run: RunFolder) -> str | None:
    """None where the run's config.json is damaged."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(run.config["preset"])
    return None


@contextmanager
def friendly_exit() -> Iterator[None]:
    """A user's mistake: one message and exit code 2. A stop: how to go on, and 130."""
    try:
        yield
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(f"Stopped. Nothing is lost; go on with: {stopped.go_on or resume_command(stopped.folder)}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        print("Stopped at once. Go on from the last checkpoint with the same command and --resume.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def resume_command(folder: Path) -> str:
    """The command that was given, with what it takes to go on."""
    is_verb = Path(sys.argv[0]).parts[-2:] == ("lowmem_rmu", "__main__.py")
    module = "lowmem_rmu" if is_verb else "lowmem_rmu.run"
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    is_named = any(argument == "--name" or argument.startswith("--name=") for argument in given)
    named = [] if is_named else ["--name", folder.name]
    return command_line("python", "-m", module, *given, *named, "--resume")


def quiet_libraries() -> None:
    """Keeps the libraries' own notes out of the run's output (errors still show), their caches small, and code of the Hub out."""
    # Where the package `kernels` is installed, bitsandbytes and transformers would download compiled code and run it: to this process
    # there is no such package.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    # In 16 bits on a CPU, torch compiles kernels for every shape of batch and keeps 1,024 of them, twice: 300 MB for the tiny model.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # OpenMP's threads wait for each other actively. Where another process has one of two cores, a tiny model's run then takes 40
    # minutes instead of one; with a short wait it does not, and loses nothing on idle cores. (Read when torch is imported.)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on being imported it warns of optional CPU kernels that are not used here
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def presets_table() -> Table:
    """Every preset: model, size, memory, what is forgotten."""
    import torch

    from lowmem_rmu.model.memory import config_for_plan, count_weights, gib
    from lowmem_rmu.model.memory import plan as memory_plan

    table = Table(title="Presets", title_justify="left")
    for column in ("Preset", "Model", "Parameters", "GPU memory needed", "Forgets"):
        table.add_column(column, no_wrap=column == "Preset", overflow="fold")
    for name in preset_names():
        preset = load_preset(name)
        weights = count_weights(config_for_plan(preset), preset.rmu.modules)
        needed = max(stage.total for stage in memory_plan(preset, torch.device("cuda")))
        table.add_row(name, Path(preset.model.name).name, _millions(weights.total()), gib(needed), ", ".join(preset.topics))
    return table


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def print_plan(preset: Preset, device: str, stages: list[str]) -> None:
    """What would be loaded, downloaded and trained, and the memory each stage needs."""
    from lowmem_rmu.data.sources import find_sources, sentences
    from lowmem_rmu.inputs import needs_text
    from lowmem_rmu.model.loading import check_checkpoint, resolve_device
    from lowmem_rmu.model.memory import gib, memory_available
    from lowmem_rmu.model.memory import plan as memory_plan

    on, console = resolve_device(device), Console()
    check_checkpoint(preset.model)
    read = sentences(find_sources(preset, needs_text(preset, stages)), only_partly_read=False)
    evaluates, needs = any(stage.startswith("evaluate") for stage in stages), memory_plan(preset, on, stages)
    for label, words in plan_lines(preset, evaluates).items():
        console.print(f"{label:<10} {words}", highlight=False, soft_wrap=True)
    for sentence in read:
        console.print(f"{'Read':<10} {sentence}", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("Stage", "Weights", "Working memory", "Cache, at most", "Together"):
        table.add_column(column, justify="left" if column == "Stage" else "right")
    for need in needs:
        table.add_row(need.stage, gib(need.weights), gib(need.working), gib(need.cache) if need.cache else "-", gib(need.total))
    console.print(table)
    console.print(f"Free on {on} now: {gib(memory_available(on))}. The libraries themselves take about 0.6 GiB of main memory.", highlight=False)


def print_left_out(sources: "Sources") -> None:
    """Say on stderr what is read of each folder of which not everything is."""
    from lowmem_rmu.data.sources import sentences

    for sentence in sentences(sources, only_partly_read=True):
        print(f"Read for {sentence}.", file=sys.stderr, flush=True)


def plan_lines(preset: Preset, evaluates: bool) -> dict[str, str]:
    """What would be loaded, downloaded and trained, in words."""
    from lowmem_rmu.model.memory import config_for_plan, count_weights, gib
    from lowmem_rmu.presets import is_local

    weights, rmu, model = count_weights(config_for_plan(preset), preset.rmu.modules), preset.rmu, preset.model
    corpora = [*(topic.corpus for topic in preset.topics.values()), *preset.retain.corpora]
    sources = [corpus.source for corpus in corpora] + [task.source for task in preset.evaluation.tasks.values()]
    remote = sorted({source for source in sources if not is_local(source)})
    precision = "4-bit (NF4, double quantisation)" if model.quantisation == "nf4" else "not quantised"
    method = f"LoRA of rank {rmu.rank} on" if rmu.trainable == "lora" else "the matrices"
    adapted = f"{', '.join(rmu.modules)} of layers {', '.join(map(str, rmu.adapter_layers))}"
    needed = weights.total() if evaluates else weights.up_to(rmu.target_layer + 1)
    size = f"about {gib(2 * needed)} of weights in 16 bits (in whole files), unless they are cached"
    return {
        "Preset": preset.title,
        "Model": f"{model.name}: {_millions(weights.total())} parameters, {precision}",
        "Download": "nothing: a local folder" if is_local(model.name) else size,
        "Data": f"{', '.join(remote)} (Hub)" if remote else "local files only",
        "Loaded": f"{weights.layers} of {weights.layers} layers" if evaluates else f"{rmu.target_layer + 1} of {weights.layers} layers, no head",
        "Trained": f"{rmu.steps} steps; {method} {adapted}: {_millions(weights.learning(rmu))} parameters",
        "Steered": f"the output of layer {rmu.target_layer}; layers 0 to {rmu.target_layer} run in training, the others do not",
    }


def print_summary(folder: RunFolder, as_json: bool) -> None:
    """The closing table and the verdict, or the summary as JSON."""
    # Heavy libraries load only once there is work for them.
    from lowmem_rmu.evaluation.summary import NOT_AUDITED, Headline

    path = folder.path / "summary.json"
    if not path.exists():
        print(f"Done: {folder.path}", file=sys.stderr)
        return
    from lowmem_rmu.evaluation.summary import read_summary

    summary = read_summary(folder)
    if as_json:
        print_json(summary)
        return
    console = Console()
    if summary["rows"]:
        console.print(accuracy_table(summary))
    if summary["texts"]:
        console.print(text_table(summary))
    headline = Headline.of(folder, summary["verdict"])
    for sentence in [*summary.get("notes", []), *summary["verdict"]["sentences"]]:
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{headline.sentence}", highlight=False, style="bold")
    if headline.audit == NOT_AUDITED and headline.forgotten not in ("no", "unknown"):
        command = f"python -m lowmem_rmu audit {folder.path}"
        console.print(f"Gone, or only hidden? {command}", highlight=False, soft_wrap=True)
    console.print(f"Report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    chat = command_line("python", "-m", "lowmem_rmu", "chat", folder.path)
    console.print(f"Talk to both: {chat}", highlight=False, markup=False, soft_wrap=True)


def accuracy_table(summary: dict[str, Any]) -> Table:
    """Accuracy in percent with its standard error; subjects only where they are few, or next to what is forgotten."""
    from lowmem_rmu.evaluation.compare import counted
    from lowmem_rmu.evaluation.statistics import LUCK

    title = "Accuracy in % (± standard error); chance 25; * larger than noise"
    table = _table(title, ["Task", "Should be"], ["Questions", "Base", "Unlearned", "Change", ""])
    subjects = sum(row["group"] is not None and not row["is_group"] for row in summary["rows"])
    for row in summary["rows"]:
        if row["group"] and not row["is_group"] and subjects > 12 and row["role"] != "adjacent":
            continue
        cells = [_percent(row[side], row[f"{side}_stderr"]) for side in ("base", "unlearned", "change")]
        mark = "*" if row["p_value"] is not None and row["p_value"] < LUCK else ""
        table.add_row(_task(row), row["role"], counted(row["questions"], row["sampled_from"]), *cells, mark)
    # A summary of an older version says nothing of subjects without a question: there, each had one.
    unasked = [
        f"{task}: no question on {', '.join(subjects)}"
        for task, subjects in summary.get("unasked", {}).items()
    ]
    table.caption = f"Fewer questions than subjects. {'; '.join(unasked)}." if unasked else None
    return table


def _task(row: dict[str, Any]) -> str:
    """A task, and how it was asked where that is unusual; its averages and subjects stand under it, without its name."""
    from lowmem_rmu.evaluation.compare import asked_how

    if row["group"] is None:
        return " ".join(filter(None, (row["task"], asked_how(row["num_fewshot"], row["scoring"]))))
    return f"  {row['task'].removeprefix(row['group'] + '_')}"


def text_table(summary: dict[str, Any]) -> Table:
    """Losses on texts that training never saw; below them how far unlearned predicts from base, where that was measured."""
    title = "Loss on held-out text in nats a token (change ± standard error)"
    table = _table(title, ["Text", "Should be"], ["Tokens", "Base", "Unlearned", "Change", "Bits a byte"])
    for row in summary["texts"]:
        base, unlearned, *bits = (_nats(row[key]) for key in ("base", "unlearned", "base_bits_per_byte", "unlearned_bits_per_byte"))
        change = "-" if row["change"] is None else f"{_nats(row['change'])} ± {_nats(row['change_stderr'])}"
        table.add_row(row["name"], row["role"], f"{row['tokens']:,}", base, unlearned, change, " → ".join(bits))
    far = [f"{row['name']} {row['kl']:.4f} ± {row['kl_stderr']:.4f}" for row in summary["texts"] if row["kl"] is not None]
    table.caption = f"KL from base to unlearned in nats a token: {', '.join(far)}" if far else None
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    """Narrow enough for 80 columns; where that is not enough, the names are folded, not the numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in left + right:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column != left[0], overflow="fold")
    return table


def _percent(share: float | None, stderr: float | None) -> str:
    return "-" if share is None or stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    prepare_streams()
    typer.run(run)


if __name__ == "__main__":
    main()
