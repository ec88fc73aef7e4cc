"""Errors that a user can act on: what is wrong, where, and what to do next."""

import errno
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import TypeAdapter

LONGEST_VALUE, LONGEST_WORD, LONGEST_LINE = 100, 500, 2000
"""Characters of a quoted value, a word and a line of a message; the middle of longer ones is left out."""
_UNPRINTABLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal takes for a command, or no encoding can write; a line feed and a tab are neither."""


@dataclass(frozen=True)
class ResumeRun:
    """Resume a run."""

    name: str
    command: str = ""
    """What stands in front of the options, where the whole command is said."""


@dataclass(frozen=True)
class AuditAgain:
    """Discard what an earlier audit found."""

    run: str | None = None
    """The run's folder, where the whole command is said."""


@dataclass(frozen=True)
class ChangeSettings:
    """Choose one of several sets of other settings, each with a remark such as the memory that it takes."""

    choices: tuple[tuple[dict[str, Any], str], ...]
    """Settings by dotted path; `stages` stands for the stages of the run."""


Action = ResumeRun | AuditAgain | ChangeSettings
"""A step that front ends word in different ways: by an option of the command line, or by a button of the
page.
"""


@dataclass(frozen=True)
class Fix:
    """What to do about an error. `{action}` in the text stands for the action, which each front end words for
    itself.
    """

    text: str
    action: Action

    def words(self, wording: Callable[[Action], str]) -> str:
        """Return the text with its action in the words of a front end."""
        return self.text.replace("{action}", wording(self.action))

    def __str__(self) -> str:
        return self.words(on_command_line)


def with_more(fix: str | Fix, text: str) -> str | Fix:
    """Return a fix with a further line."""
    return Fix(f"{fix.text}\n{text}", fix.action) if isinstance(fix, Fix) else f"{fix}\n{text}"


def on_command_line(action: Action) -> str:
    """Word an action for the command line."""
    match action:
        case ResumeRun(name, command):
            return f"{command} --resume --name {name}".strip()
        case AuditAgain(run):
            return command_line("python", "-m", "lowmem_rmu", "audit", run, "--again") if run else "--again"
        case ChangeSettings(choices):
            return "".join(f"\n  {_as_options(settings)}: {remark}" for settings, remark in choices)


def _as_options(settings: dict[str, Any]) -> str:
    options = []
    for path, value in settings.items():
        options.append(f"--stages {value}" if path == "stages" else f"--set {path}={str(value).lower()}")
    return " ".join(options)


class UserError(Exception):
    """A mistake or a limit that the user can mend. The command line prints it without a traceback and exits
    with 2.

    The message may quote what somebody typed or a server answered: control characters are shown as escapes,
    and what is too long to be read is shortened.

    Args:
        problem: What is wrong, and where.
        fix: What to do next.
        place: The setting, file or field that it is about, where a front end may want to point at it.

    """

    def __init__(self, problem: str, fix: str | Fix | None = None, *, place: str | None = None) -> None:
        self.problem = problem
        self.fix = fix
        self.place = place
        super().__init__(self.words(on_command_line))

    def words(self, wording: Callable[[Action], str]) -> str:
        """Return the whole message with its action, if it has one, in the words of a front end."""
        fix = self.fix.words(wording) if isinstance(self.fix, Fix) else self.fix
        return readable(self.problem if fix is None else f"{self.problem}\n{fix}")


def error_record(error: UserError) -> dict[str, Any]:
    """Return the parts of an error as a `status.json` holds them, so that another front end can word its
    action.
    """
    if isinstance(error.fix, Fix):
        action = {"kind": type(error.fix.action).__name__} | asdict(error.fix.action)
        return {"problem": error.problem, "fix": error.fix.text, "action": action}
    return {"problem": error.problem, "fix": error.fix, "action": None}


def recorded_error(record: dict[str, Any]) -> UserError | None:
    """Return the error that a `status.json` holds; None where it holds none, or not in its parts."""
    problem, fix, action = (record.get(key) for key in ("problem", "fix", "action"))
    if problem is None:
        return None
    if fix is None or action is None:
        return UserError(problem, fix)
    kinds: dict[str, type[Action]] = {kind.__name__: kind for kind in (ResumeRun, AuditAgain, ChangeSettings)}
    values = {key: value for key, value in action.items() if key != "kind"}
    return UserError(problem, Fix(fix, TypeAdapter(kinds[action["kind"]]).validate_python(values)))


def readable(message: str) -> str:
    """Show control characters as escapes, and shorten words and lines that nobody would read to their end."""
    printable = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message)
    words = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: shortened(found[0], LONGEST_WORD), printable)
    return "\n".join(shortened(line, LONGEST_LINE) for line in words.split("\n"))


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """Return the text, or its beginning and its end with the number of characters in between."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end]}[... {len(text):,} characters ...]{text[-end:]}"


def shown(value: object) -> str:
    """Return a value in a message, as Python writes it, short enough to read."""
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
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(
        error
    )


def is_unreachable(error: BaseException) -> bool:
    """Return whether a request got no answer: refused, timed out, cut off, no such host.

    huggingface_hub speaks through httpx or its successor httpx2, whose errors have the same names and no
    common base.
    """
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
    return isinstance(error, ConnectionError) or not names.isdisjoint(
        {("httpx", "TransportError"), ("httpx2", "TransportError")}
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and everything it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def not_reachable(kind: str, name: str) -> UserError:
    """Make the error for a `kind` ("model" or "data set") that is not in the cache of a machine without a
    network.
    """
    return UserError(
        f"The {kind} {name} is not on this machine and the Hub cannot be reached.",
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
        f"{_folder_of_this_name(name)}",
    )


def _folder_of_this_name(name: str) -> str:
    """Return a further sentence where a Hub id is also the path of a folder."""
    return f"\nThere is a folder {name} here: write ./{name} for it." if Path(name).is_dir() else ""


@contextmanager
def hub_errors(kind: str, name: str, instead: str | None = None) -> Iterator[None]:
    """Translate failures to load `name` from the Hub or a local folder into UserErrors; `kind` is "model" or
    "data set".

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
            f"1. Ask for access on {page} (a person may have to grant it).\n"
            "2. Make a token on https://huggingface.co/settings/tokens.\n"
            "3. Give it: `hf auth login`, or the environment variable HF_TOKEN."
        )
        seen = "The token that was found has no access to it." if token else "No token was found."
        return f"The {kind} {name} is gated: its owners grant access by request. {seen}\n{what_next}" + (
            f"\n{instead}" if instead else ""
        )
    if any(
        isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or is_unreachable(error)
        for error in chain
    ):
        return str(not_reachable(kind, name))
    if any(isinstance(error, RevisionNotFoundError) for error in chain):
        return f"The {kind} {name} has no such revision.\nSee {page} for those there are."
    if (
        any(isinstance(error, RepositoryNotFoundError) for error in chain)
        or "doesn't exist on the Hub" in words
    ):
        folder = _folder_of_this_name(name)
        return (
            f"There is no {kind} {name} on the Hub, or it is private.\n"
            f"Check the name; a local path starts with ./ or /.{folder}"
        )
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            return (
                f"The Hub answered with error {error.response.status_code} when asked for the {kind} "
                f"{name}.\n"
                "Try again in a while."
            )
    return None
