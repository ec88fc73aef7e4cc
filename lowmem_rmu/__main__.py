"""`python -m lowmem_rmu VERB`: run, chat, presets."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import recorded_preset
from lowmem_rmu.run import friendly_exit, presets_table, quiet_libraries, run
from lowmem_rmu.runs import RunFolder

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make a chat model forget, and prove it.")
app.command()(run)


@app.command()
def presets() -> None:
    """Lists the presets."""
    quiet_libraries()
    Console().print(presets_table())


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
        from lowmem_rmu.chat import both_sides  # heavy libraries load only once there is work for them
        from lowmem_rmu.model.adapters import load_adapter
        from lowmem_rmu.model.loading import load_model, load_tokenizer, resolve_device
        from lowmem_rmu.pipeline import unquantised_modules

        folder = RunFolder.open(run_folder.parent, run_folder.resolve().name)
        if not folder.adapter.exists():
            raise UserError(f"Run {folder.path} has no adapter yet.\nGo on with it: python -m lowmem_rmu.run ... --resume --name {folder.path.name}")
        preset = recorded_preset(folder.config["settings"], folder.path)
        tokenizer = load_tokenizer(preset.model)
        model = load_adapter(load_model(preset.model, resolve_device(device), unquantised=unquantised_modules(preset)), folder.adapter)
        writer = SideWriter()
        for question in [prompt] if prompt else questions():
            for side, _ in both_sides(model, tokenizer, question, max_new_tokens, writer.write):
                writer.end(side)


class SideWriter:
    """Prints the pieces of an answer behind the name of its side."""

    def __init__(self) -> None:
        self.started: set[str] = set()

    def write(self, side: str, piece: str) -> None:
        if side not in self.started:
            self.started.add(side)
            print(f"{side:>9}: ", end="")
        print(piece, end="", flush=True)

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
        except EOFError:
            return
        if not question:
            return
        yield question


def main() -> None:
    app()


if __name__ == "__main__":
    main()
