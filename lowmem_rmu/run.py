"""`python -m lowmem_rmu.run PRESET`: the main job, in one command."""

import typer

from lowmem_rmu.cli.run import run
from lowmem_rmu.console import prepare_streams


def main() -> None:
    """Run the verb `run` with the arguments of the command line."""
    prepare_streams()
    typer.run(run)


if __name__ == "__main__":
    main()
