"""`python -m lowmem_rmu VERB`: run, presets, evaluate, chat, neighbors, export, audit."""

import typer

from lowmem_rmu.cli.audit import audit
from lowmem_rmu.cli.chat import chat
from lowmem_rmu.cli.evaluate import evaluate
from lowmem_rmu.cli.export import export
from lowmem_rmu.cli.neighbors import neighbors
from lowmem_rmu.cli.presets import presets
from lowmem_rmu.cli.run import run
from lowmem_rmu.console import prepare_streams

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make a chat model forget, and prove it.")
for verb in (run, presets, evaluate, chat, neighbors, export, audit):
    app.command()(verb)


def main() -> None:
    """Run the verb that the command line names."""
    prepare_streams()
    app()


if __name__ == "__main__":
    main()
