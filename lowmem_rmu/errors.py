"""Errors that a user can act on: what is wrong, where, and what to do next."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import httpx
from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class UserError(Exception):
    """A mistake or a limit that the user can mend; the command line prints it without a traceback and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean "x" or "y"?`, or what there is where nothing comes near."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f'"{match}"' for match in close) + "?"
    return "There is: " + ", ".join(known) + "."


def is_disk_full(error: BaseException) -> bool:
    """Also where a library says so in words only, as safetensors does."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and everything it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
    if any(isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | httpx.TransportError | ConnectionError) for error in chain):
        return (
            f"The {kind} {name} is not on this machine and the Hub cannot be reached.\n"
            "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
        )
    if any(isinstance(error, RevisionNotFoundError) for error in chain):
        return f"The {kind} {name} has no such revision.\nSee {page} for those there are."
    if any(isinstance(error, RepositoryNotFoundError) for error in chain) or "doesn't exist on the Hub" in words:
        return f"There is no {kind} {name} on the Hub, or it is private.\nCheck the name; a local path starts with ./ or /."
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            return f"The Hub answered with error {error.response.status_code} when asked for the {kind} {name}.\nTry again in a while."
    return None
