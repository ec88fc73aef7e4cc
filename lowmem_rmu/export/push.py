"""An export on its way to the Hub: private unless told otherwise, with a token that is written nowhere."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lowmem_rmu.errors import UserError, causes, is_unreachable
from lowmem_rmu.export.card import CARD, SUMS

LOGIN = (
    "Give one: `hf auth login`, or the environment variable HF_TOKEN. "
    "(https://huggingface.co/settings/tokens makes them.)"
)


def push(artefact: Path, repo_id: str, private: bool = True) -> str:
    """Upload the folder of a complete export as the model `OWNER/NAME` of the Hub, and give the address of
    the commit.

    The token is that of the environment or of the Hub's own login. Raises UserError, before anything is
    uploaded, where the name is none, the export has no card, there is no token or no network, or a private
    upload would land in a model that is public.
    """
    check_name(repo_id)
    if not all((artefact / name).is_file() for name in (CARD, SUMS)):
        raise UserError(
            f"{artefact} is no complete export: it lacks {CARD} or {SUMS}.",
            "Export the run again.",
        )
    if is_offline_mode():
        raise UserError(
            f"{repo_id} cannot be uploaded: HF_HUB_OFFLINE is on.",
            "Unset it, and TRANSFORMERS_OFFLINE, which means the same.",
        )
    if get_token() is None:
        raise UserError(
            f"{repo_id} cannot be uploaded: no token of the Hub was found.",
            f"{LOGIN}",
        )
    api = HfApi()
    with told_in_words(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(
                f"{repo_id} is there already, and everybody can read it. Nothing was uploaded.",
                "Choose another name, make it private on its page, or say that this upload may be public.",
            )
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=artefact, commit_message="Upload an unlearned model"
            ).commit_url
        )


def check_name(repo_id: str) -> None:
    """Raise UserError where it is not of the form OWNER/NAME as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
        named = re.fullmatch(r"[^/]+/[^/]+", repo_id)
    except HFValidationError:
        named = None
    if not named:
        raise UserError(
            f'"{repo_id}" is no name of a model on the Hub: give OWNER/NAME, of letters, digits, "-", "_" '
            'and ".", for example me/tiny.'
        )


@contextmanager
def told_in_words(repo_id: str) -> Iterator[None]:
    """Translate errors of the Hub into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _message(repo_id, list(causes(error)))
        if message is None:
            raise
        raise UserError(message) from error


def _message(repo_id: str, chain: list[BaseException]) -> str | None:
    # In the library's words.
    if isinstance(chain[0], ValueError) and any(isinstance(error, HfHubHTTPError) for error in chain):
        return f"{repo_id} cannot be uploaded: the Hub does not take its card.\n{chain[0]}"
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            return _refusal(repo_id, error.response.status_code)
        if isinstance(error, OfflineModeIsEnabled) or is_unreachable(error):
            return (
                f"{repo_id} cannot be uploaded: the Hub cannot be reached.\n"
                "Check the network, and run the same command again."
            )
    return None


def _refusal(repo_id: str, status: int) -> str:
    if status == 401:
        return f"{repo_id} cannot be uploaded: the Hub does not know the token that was found.\n{LOGIN}"
    if status == 403:
        return (
            f"{repo_id} cannot be uploaded: the token that was found may not write there.\n"
            "Check the owner's name, or make a token that may write."
        )
    return (
        f"{repo_id} cannot be uploaded: the Hub answered with error {status}.\n"
        "Try again in a while: what is there already is not sent twice."
    )
