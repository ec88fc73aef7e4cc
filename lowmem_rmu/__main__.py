"""`python -m lowmem_rmu VERB`: run, evaluate, chat, neighbors, export, audit, presets."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowmem_rmu.console import Console, prepare_streams, print_json, printable
from lowmem_rmu.errors import UserError, command_line
from lowmem_rmu.presets import Evaluation
from lowmem_rmu.run import (
    INTERRUPTED,
    accuracy_table,
    friendly_exit,
    presets_table,
    print_left_out,
    quiet_libraries,
    run,
    watched,
)
from lowmem_rmu.runs import RunFolder, Stopped, present
from lowmem_rmu.turns import turn

if TYPE_CHECKING:
    from lowmem_rmu.audit.suite import Settings
    from lowmem_rmu.export.formats import Wanted

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make a chat model forget, and prove it.")
app.command()(run)


EVALUATIONS = Path("evaluations")


@app.command()
def presets() -> None:
    """Lists the presets."""
    quiet_libraries()
    Console().print(presets_table())


@app.command()
def evaluate(
    model_or_run: Annotated[str | None, typer.Argument(help="A Hub id, or the folder of a model, of an adapter or of a run.")] = None,
    tasks: Annotated[str, typer.Option(help="With commas: wmdp, wmdp_bio, mmlu, mmlu_stem, mmlu_virology, ...")] = "wmdp,mmlu",
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Answered examples before each question; what the task says if left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task at most: a sample over its subjects, always the same.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="TASK.KEY=VALUE", help="Change a task, e.g. mmlu.source=./mmlu.")] = None,
    quantisation: Annotated[Literal["nf4", "none"] | None, typer.Option(help="nf4 or none; the run's, or nf4, if left out.")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    batch_tokens: Annotated[str, typer.Option(help="Tokens in a forward pass at most; auto tries what is fastest.")] = "auto",
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible server instead (key: OPENAI_API_KEY).")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on that server.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where results go; evaluations/<model>-<time> if left out. An old one is gone on with.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Asks any model, adapter or run A-D questions, as lm-evaluation-harness does."""
    quiet_libraries()
    with friendly_exit():
        from lowmem_rmu.measure import choose_tasks  # heavy libraries load only once there is work for them

        asked = choose_tasks(tasks, num_fewshot, set_ or [], limit, int(batch_tokens) if batch_tokens.isdecimal() else batch_tokens)
        if model_or_run is not None and endpoint is None and model is None:
            summary = ask_model(model_or_run, quantisation, dtype, device, asked, to)
        elif model_or_run is None and endpoint is not None and model is not None:
            summary = ask_server(endpoint, model, asked, to)
        else:
            raise UserError("Which model? Give either a model or a run, or --endpoint URL with --model NAME.")
        if summary:
            print_json(summary) if as_json else Console().print(accuracy_table(summary))


def ask_model(name: str, quantisation: str | None, dtype: str | None, device: str, asked: Evaluation, to: Path | None) -> dict[str, Any]:
    """The summary; empty in all processes but the first."""
    from lowmem_rmu.data.sources import find_task_sources
    from lowmem_rmu.distributed import Distributed
    from lowmem_rmu.measure import find_subject, measure
    from lowmem_rmu.model.loading import resolve_device

    subject, distributed = find_subject(name, quantisation, dtype), Distributed()
    folder = to or EVALUATIONS / RunFolder.new_name(subject.file_name)
    if distributed.is_main_process:
        print_left_out(find_task_sources(asked))
    with watched(folder) if distributed.is_main_process else nullcontext() as watcher:
        return measure(subject, asked, resolve_device(distributed.device(device)), folder, watcher, distributed)


def ask_server(url: str, model: str, asked: Evaluation, to: Path | None) -> dict[str, Any]:
    from lowmem_rmu.data.sources import find_task_sources
    from lowmem_rmu.evaluation.endpoint import Endpoint
    from lowmem_rmu.measure import as_file_name, measure_endpoint

    endpoint, folder = Endpoint(url, model), to or EVALUATIONS / RunFolder.new_name(as_file_name(model))
    print_left_out(find_task_sources(asked))
    with watched(folder) as watcher:
        return measure_endpoint(endpoint, asked, folder, watcher)


@app.command()
def chat(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and end; without it, ask as often as you like.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Puts the same prompt to base and unlearned, streamed, from one model in memory."""
    quiet_libraries()
    with friendly_exit():
        # Heavy libraries load only once there is work for them.
        from lowmem_rmu.chat import Sampling, both_sides, check_conversation, load_run
        from lowmem_rmu.model.loading import resolve_device

        if prompt is None and sys.stdin is None:
            raise UserError("There is no standard input to type prompts into.\nGive one with --prompt.")
        folder = RunFolder.open(run_folder.parent, run_folder.resolve().name)
        model, tokenizer = load_run(folder, resolve_device(device))
        sampling, writer = Sampling(max_new_tokens=max_new_tokens), SideWriter()
        for question in questions() if prompt is None else [prompt]:
            try:
                check_conversation(model, tokenizer, question, sampling)
            except UserError as error:
                if prompt is not None:
                    raise
                print(error, file=sys.stderr)
                continue
            for side, _ in both_sides(model, tokenizer, question, sampling, writer.write):
                writer.end(side)


@app.command()
def neighbors(
    preset: Annotated[str, typer.Argument(help="The name of a preset, or the path of a YAML file: its model writes.")],
    subjects: Annotated[list[str], typer.Argument(help="Subjects next to the topic that must stay, e.g. marketing accounting.")],
    count: Annotated[int, typer.Option(min=1, help="Passages per subject.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a passage.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting of the preset.")] = None,
    to: Annotated[Path, typer.Option(help="The file to write.")] = Path("neighbors.jsonl"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Let the base model write passages about subjects next to a topic, for the retain set."""
    quiet_libraries()
    with friendly_exit():
        if to.suffix.lower() != ".jsonl":
            raise UserError(f"The passages are JSON lines, and a corpus is read by its ending.\nName the file {to.with_suffix('.jsonl')}.")
        if to.exists():
            raise UserError(f"{to} exists already.\nDelete it, or choose another file with --to.")
        to.parent.mkdir(parents=True, exist_ok=True)

        from lowmem_rmu.model.loading import load_model, load_tokenizer, resolve_device
        from lowmem_rmu.neighbors import save_passages, write_passages
        from lowmem_rmu.presets import load_preset

        settings = load_preset(preset, set_ or []).model
        tokenizer = load_tokenizer(settings)
        model = load_model(settings, resolve_device(device))

        def report(written: int, total: int) -> None:
            print(f"{written} of {total} passages", file=sys.stderr)

        try:
            passages = write_passages(model, tokenizer, subjects, count, max_new_tokens, seed, report)
        except KeyboardInterrupt:
            print(f"Stopped. {to} was not written.", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        save_passages(passages, to)
        print(f"Wrote {len(passages)} passages to {to}. Read some of them: delete those that are about the topic itself.")
        print(f"Then add the file to the retain set of the preset:\n  retain:\n    corpora:\n      - {{source: {as_source(to)}, share: 0.3}}")


def as_source(file: Path) -> str:
    """Return a path as a preset names it: local sources start with `./`, `../`, `/` or `~`."""
    return str(file) if file.is_absolute() or file.parts[0] in ("..", "~") else f"./{file.as_posix()}"


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")],
    to: Annotated[Path, typer.Option(help="The folder to write: a new or an empty one.")],
    format_: Annotated[
        Literal["adapter", "merged", "gguf"], typer.Option("--format", help="adapter alone, merged into the whole model, or as GGUF for llama.cpp.")
    ] = "merged",
    kind: Annotated[Literal["f16", "bf16", "q8_0", "q4_0"], typer.Option("--gguf-type", help="How a GGUF file stores its matrices.")] = "q8_0",
    base: Annotated[
        Literal["original", "dequantised"], typer.Option(help="Merge into the checkpoint, or into the 4-bit weights that were trained on.")
    ] = "original",
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files that stay as they are, too; without it they are links.")] = False,
    verify: Annotated[bool, typer.Option(help="Load what was written and ask it the run's questions.")] = True,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the Hub, where only you can read it.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read what --push uploads, the run's own texts in reproduce/ too.")] = False,
    device: Annotated[str, typer.Option(help="Where it is verified: auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Writes a run's model for other programs, and asks what was written whether it has forgotten too."""
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
                f"Not uploaded: {mark}.\nIf you want it to be there all the same: {upload_command}"
            )
        if push:
            print(f"Uploaded: {upload(to, push, private=not public)}")


@app.command()
def audit(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")],
    attacks: Annotated[str, typer.Option(help="Which ones, with commas between them; all if left out.")] = "",
    budget: Annotated[float | None, typer.Option(min=0, help="Minutes it may take; what does not fit is named.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions per forgotten task at most; what --power takes if left out.")
    ] = None,
    power: Annotated[
        float | None,
        typer.Option(min=0.01, max=0.99, help="Probability to find what is gone; 0.8 with 100 to 300 questions per task."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Print what each attack will take; try nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Discard what an earlier audit of the run found.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json.")] = False,
) -> None:
    """Attacks a run's model: is what it forgot gone, or only hidden?"""
    quiet_libraries()
    with friendly_exit():
        from lowmem_rmu.audit.suite import ATTACKS, Settings  # heavy libraries load only once there is work for them

        folder = RunFolder.open(run_folder.parent, run_folder.resolve().name)
        names = [name.strip() for name in attacks.split(",") if name.strip()] or list(ATTACKS)
        run_attacks(folder, names, budget, Settings(limit, seed), plan, again, device, as_json, power)


def run_attacks(
    folder: RunFolder, names: list[str], budget: float | None, settings: "Settings", plan: bool, again: bool, device: str,
    as_json: bool, power: float | None = None,
) -> None:  # fmt: skip
    """Waits for its turn, for attacks take the device; prints what they will take and, unless that is all that is asked, what they found.

    All is printed before the turn ends: who sees that it has ended reads there how.
    """
    from lowmem_rmu.audit.suite import Audit, open_audit
    from lowmem_rmu.audit.tables import audit_tables, cost_table
    from lowmem_rmu.evaluation.summary import note_audit
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.report import write_report

    on, chosen = resolve_device(device), Audit.choose(names)
    try:
        with (
            turn(folder.path.parent.resolve(), folder.audit_name, os.getpid(), say_once("audit")),
            present(folder.path),
            watched(folder.path, "Audit") as watcher,
            TemporaryDirectory() as scratch,
        ):
            opened = open_audit(folder, on, settings, watcher, again, power, Path(scratch) if plan else None)
            Console(stderr=True).print(cost_table([opened.foretell(attack) for attack in chosen]))
            if opened.power:
                print(opened.power.words, file=sys.stderr)
            if plan:
                return
            try:
                found = opened.run(chosen, None if budget is None else 60 * budget)
            finally:  # what was found until a stop is told too
                if (folder.path / "summary.json").exists():
                    note_audit(folder)
                    write_report(folder)
            print_json(found) if as_json else Console().print(audit_tables(found))
            print(f"Audited: {folder.audit_result}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        raise Stopped(folder.path, "the same command") from None


def write_export(folder: RunFolder, wanted: "Wanted", to: Path, device: str) -> str | None:
    """Waits for its turn, for verifying takes the device; then prints what was done and found, and gives the mark."""
    from lowmem_rmu.evaluation.multiple_choice import Interrupted
    from lowmem_rmu.export.formats import export as write
    from lowmem_rmu.export.verification import verification_tables
    from lowmem_rmu.measure import followed
    from lowmem_rmu.model.loading import resolve_device

    on = resolve_device(device)
    try:
        with (
            turn(folder.path.parent.resolve(), folder.export_name, os.getpid(), say_once("export")),
            present(folder.path),
            watched(to, "Export") as watcher,
        ):
            exported = write(folder, wanted, to, on, partial(followed, watcher))
    except (KeyboardInterrupt, Interrupted):
        raise Stopped(folder.path, "the same command. (Of the export nothing was left.)") from None
    for sentence in exported.sentences:
        Console().print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    if exported.verification:
        Console().print(verification_tables(exported.verification))
    Console().print(f"Exported: {to}", highlight=False, markup=False, soft_wrap=True)
    return exported.verification.mark if exported.verification else None


def say_once(what: str) -> Callable[[list[str]], None]:
    """Says who comes before this export or audit, whenever that has changed."""
    said = list[str]()

    def say(before: list[str]) -> None:
        if before != said:
            said[:] = before
            print(f"Waiting: {', '.join(before)} before this {what}.", file=sys.stderr, flush=True)

    return say


class SideWriter:
    """Prints the pieces of an answer behind the name of its side."""

    def __init__(self) -> None:
        self.started: set[str] = set()

    def write(self, side: str, piece: str) -> None:
        if side not in self.started:
            self.started.add(side)
            print(f"{side:>9}: ", end="")
        print(printable(piece), end="", flush=True)

    def end(self, side: str) -> None:
        if side not in self.started:
            print(f"{side:>9}: (nothing)", end="")
        self.started.discard(side)
        print()


def questions() -> Iterator[str]:
    """What the user types, until an empty line or the end of the input."""
    print("Ask both models. An empty line ends.", file=sys.stderr)
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, OSError):  # closed, or the terminal is gone
            return
        except UnicodeDecodeError as error:
            raise UserError(f"What was typed is not in the encoding of the input, {error.encoding}.\nSet PYTHONUTF8=1, and ask again.") from error
        if not question:
            return
        yield question


def main() -> None:
    prepare_streams()
    app()


if __name__ == "__main__":
    main()
