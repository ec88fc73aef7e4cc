"""How a command ends: a message and exit code 2 for the mistakes of users, 130 for a stop."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowmem_rmu.console import printable
from lowmem_rmu.errors import UserError, command_line
from lowmem_rmu.runs.status import Stopped

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@contextmanager
def friendly_exit() -> Iterator[None]:
    """End with one message and exit code 2 for a user's mistake; with the command to resume and 130 for a
    stop.
    """
    try:
        yield
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(
            f"Stopped. Nothing is lost; go on with: {stopped.go_on or resume_command(stopped.folder)}",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        print(
            "Stopped at once. Go on from the last checkpoint with the same command and --resume.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None


def resume_command(folder: Path) -> str:
    """Return the command that was given, with what it takes to go on."""
    is_verb = Path(sys.argv[0]).parts[-2:] == ("lowmem_rmu", "__main__.py")
    module = "lowmem_rmu" if is_verb else "lowmem_rmu.run"
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    is_named = any(argument == "--name" or argument.startswith("--name=") for argument in given)
    named = [] if is_named else ["--name", folder.name]
    return command_line("python", "-m", module, *given, *named, "--resume")
