"""The verb `chat`: put the same prompt to base and unlearned."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.console import printable
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.folder import RunFolder


def chat(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/tiny-20261121-101500.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Ask this once and end; without it, ask as often as you like.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Put the same prompt to base and unlearned, streamed, from one model in memory."""
    quiet_libraries()
    with friendly_exit():
        # Heavy libraries load only once there is work for them.
        from lowmem_rmu.chat.conversation import Sampling
        from lowmem_rmu.chat.generation import both_sides, check_conversation
        from lowmem_rmu.chat.session import load_run
        from lowmem_rmu.model.loading import resolve_device

        if prompt is None and sys.stdin is None:
            raise UserError(
                "There is no standard input to type prompts into.",
                "Give one with --prompt.",
            )
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
    """Yield the lines that the user types, until an empty line or the end of the input."""
    print("Ask both models. An empty line ends.", file=sys.stderr)
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, OSError):  # closed, or the terminal is gone
            return
        except UnicodeDecodeError as error:
            raise UserError(
                f"What was typed is not in the encoding of the input, {error.encoding}.",
                "Set PYTHONUTF8=1, and ask again.",
            ) from error
        if not question:
            return
        yield question
