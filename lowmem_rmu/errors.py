"""Errors that a user can act on: what is wrong, where, and what to do next."""

import errno
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LONGEST_VALUE, LONGEST_WORD, LONGEST_LINE = 100, 500, 2000
"""Characters of a quoted value, a word and a line of a message; the middle of longer ones is left out."""
_UNPRINTABLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal takes for a command, or no encoding can write; a line feed and a tab are neither."""


class UserError(Exception):
    """A mistake or a limit that the user can mend; the command line prints it without a traceback and exits with 2.

    The message may quote what somebody typed or a server answered: control characters are shown as escapes,
    and what is too long to be read is shortened.
    """

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


def readable(message: str) -> str:
    """Show control characters as escapes, and shorten words and lines that nobody would read to their end."""
    printable = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message)
    words = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: shortened(found[0], LONGEST_WORD), printable)
    return "\n".join(shortened(line, LONGEST_LINE) for line in words.split("\n"))


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """The text, or its beginning and its end with the number of characters in between."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end]}[... {len(text):,} characters ...]{text[-end:]}"


def shown(value: object) -> str:
    """A value in a message, as Python writes it, short enough to read."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean "x" or "y"?`, or what there is where nothing comes near."""
    known = sorted(known)
    close = get_close_matches(shortened(name), known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f'"{match}"' for match in close) + "?"
    return "There is: " + ", ".join(known) + "."


def command_line(*parts: object) -> str:
    """Join the parts of a command, quoted so that they can be pasted into a shell."""
    words = [str(part) for part in parts]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def is_disk_full(error: BaseException) -> bool:
    """Also where a library says so in words only, as safetensors does."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


def is_unreachable(error: BaseException) -> bool:
    """Whether a request got no answer: refused, timed out, cut off, no such host.

    huggingface_hub speaks through httpx or its successor httpx2, whose errors have the same names and no common base.
    """
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
    return isinstance(error, ConnectionError) or not names.isdisjoint({("httpx", "TransportError"), ("httpx2", "TransportError")})


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and everything it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def not_reachable(kind: str, name: str) -> UserError:
    """Make the error for a `kind` ("model" or "data set") that is not in the cache of a machine without a network."""
    return UserError(
        f"The {kind} {name} is not on this machine and the Hub cannot be reached.\n"
        f"Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /.{_folder_of_this_name(name)}"
    )


def _folder_of_this_name(name: str) -> str:
    """A further sentence where a Hub id is also the path of a folder."""
    return f"\nThere is a folder {name} here: write ./{name} for it." if Path(name).is_dir() else ""


@contextmanager
def hub_errors(kind: str, name: str, instead: str | None = None) -> Iterator[None]:
    """Tells apart why `name` could not be had from the Hub, or from a local folder: `kind` is "model" or "data set".

    `instead` is what to do without access where it is gated.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _hub_message(kind, name, list(causes(error)), instead)
        if message is None:
            raise
        raise UserError(message) from error


def _hub_message(kind: str, name: str, chain: list[BaseException], instead: str | None) -> str | None:
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    # `datasets` raises one class for all that is missing or gated, so its wording has to tell.
    words = " ".join(str(error) for error in chain)
    if any(isinstance(error, GatedRepoError) for error in chain) or "gated dataset" in words:
        token = get_token()
        what_next = (
            f"1. Ask for access on {page} (a person may have to grant it).\n2. Make a token on https://huggingface.co/settings/tokens."
            "\n3. Give it: `hf auth login`, or the environment variable HF_TOKEN."
        )
        seen = "The token that was found has no access to it." if token else "No token was found."
        return f"The {kind} {name} is gated: its owners grant access by request. {seen}\n{what_next}" + (f"\n{instead}" if instead else "")
    if any(isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or is_unreachable(error) for error in chain):
        return str(not_reachable(kind, name))
    if any(isinstance(error, RevisionNotFoundError) for error in chain):
        return f"The {kind} {name} has no such revision.\nSee {page} for those there are."
    if any(isinstance(error, RepositoryNotFoundError) for error in chain) or "doesn't exist on the Hub" in words:
        folder = _folder_of_this_name(name)
        return f"There is no {kind} {name} on the Hub, or it is private.\nCheck the name; a local path starts with ./ or /.{folder}"
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            return f"The Hub answered with error {error.response.status_code} when asked for the {kind} {name}.\nTry again in a while."
    return None
