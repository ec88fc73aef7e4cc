from pathlib import Path

import httpx
import httpx2
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Corpus
from lowmem_rmu.data.corpora import read_documents
from lowmem_rmu.errors import UserError, causes, hub_errors, nearest, shown
from tests.texts import plain

TOKEN = "hf_aVerySecretToken"


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request(
        "GET", "https://huggingface.co/api/x", headers={"authorization": f"Bearer {TOKEN}"}
    )
    return kind(f"{status} for {TOKEN}", response=httpx.Response(status, request=request))


def wrapped(cause: BaseException, outer: Exception) -> Exception:
    """As libraries do: `raise outer from cause`."""
    try:
        raise outer from cause
    except Exception as error:
        return error


def in_handler(cause: BaseException, outer: Exception) -> Exception:
    """As libraries also do: another error while one is handled."""
    try:
        try:
            raise cause
        except BaseException:
            raise outer  # noqa: B904
    except Exception as error:
        return error


def message(error: Exception, kind: str = "model", instead: str | None = None) -> str:
    with pytest.raises(UserError) as caught, hub_errors(kind, "owner/name", instead):
        raise error
    assert caught.value.__cause__ is error
    assert TOKEN not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("lowmem_rmu.errors.get_token", lambda: TOKEN)
    return TOKEN


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_rmu.errors.get_token", lambda: None)


def gated_errors() -> list[Exception]:
    gated = http_error(GatedRepoError, 403)
    return [
        gated,
        wrapped(gated, OSError("You are trying to access a gated repo.")),
        in_handler(gated, OSError("You are trying to access a gated repo.")),
        wrapped(
            gated,
            DatasetNotFoundError(
                "Dataset 'owner/name' is a gated dataset on the Hub. You must be authenticated to access it."
            ),
        ),
        DatasetNotFoundError(
            "Dataset 'owner/name' is a gated dataset on the Hub. Visit the dataset page to ask for access."
        ),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alfa", snapshot('Did you mean "alpha"?')),
        ("step", snapshot('Did you mean "steps" or "stop"?')),
        ("zzz", snapshot("There is: alpha, steps, stop.")),
    ],
)
def test_nearest_suggests_what_is_close_and_lists_everything_else(name: str, expected: str) -> None:
    assert nearest(name, {"steps", "alpha", "stop"}) == expected


def test_causes_follows_both_ways_of_raising_an_error_from_another() -> None:
    first, second, third = ValueError("1"), KeyError("2"), OSError("3")
    assert list(causes(wrapped(in_handler(first, second), third))) == [third, second, first]
    assert list(causes(None)) == []


@pytest.mark.parametrize("error", gated_errors(), ids=str)
@pytest.mark.usefixtures("no_token")
def test_gated_without_a_token_says_how_to_get_access(error: Exception) -> None:
    assert plain(message(error, "data set")) == snapshot(
        "The data set owner/name is gated: its owners grant access by request. No token was found.\n"
        "1. Ask for access on https://huggingface.co/datasets/owner/name (a person may have to grant it).\n"
        "2. Make a token on https://huggingface.co/settings/tokens.\n"
        "3. Give it: `hf auth login`, or the environment variable HF_TOKEN."
    )


@pytest.mark.parametrize("error", gated_errors(), ids=str)
@pytest.mark.usefixtures("token")
def test_gated_with_a_token_says_that_it_has_no_access_and_does_not_show_it(error: Exception) -> None:
    text = message(error)
    assert plain(text) == snapshot(
        "The model owner/name is gated: its owners grant access by request. The token that was found has no "
        "access to it.\n"
        "1. Ask for access on https://huggingface.co/owner/name (a person may have to grant it).\n"
        "2. Make a token on https://huggingface.co/settings/tokens.\n"
        "3. Give it: `hf auth login`, or the environment variable HF_TOKEN."
    )


@pytest.mark.usefixtures("no_token")
def test_what_to_do_without_access_is_the_last_line_of_the_gated_message_only() -> None:
    assert message(http_error(GatedRepoError, 401), instead="Do this.").endswith("\nDo this.")
    assert "Do this." not in message(http_error(RepositoryNotFoundError, 404), instead="Do this.")
    assert "Do this." not in message(OfflineModeIsEnabled("off"), instead="Do this.")


@pytest.mark.usefixtures("token")
def test_a_gated_corpus_of_a_shipped_preset_names_the_preset_that_works_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, *_: object, **__: object) -> None:
        raise DatasetNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub.") from http_error(
            GatedRepoError, 403
        )

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        read_documents(load_preset("zephyr-7b").topics["bio"].corpus)
    lines = str(caught.value).splitlines()
    assert "cais/wmdp-bio-forget-corpus" in lines[0]
    assert "python -m lowmem_rmu.run zephyr-7b-cyber" in lines[-1]
    assert TOKEN not in str(caught.value)


def test_an_unknown_subset_of_a_hub_corpus_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        read_documents(Corpus(source="owner/name", subset="x"))
    assert plain(caught.value) == snapshot(
        "The data set owner/name cannot be read: BuilderConfig 'x' not found. Available: ['a', 'b']"
    )


@pytest.mark.parametrize(
    "error",
    [
        http_error(RepositoryNotFoundError, 404),
        wrapped(
            http_error(RepositoryNotFoundError, 401), OSError("owner/name is not a valid model identifier")
        ),
        DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."),
    ],
    ids=str,
)
def test_what_is_not_on_the_hub_is_told_apart(error: Exception) -> None:
    assert plain(message(error, "data set")) == snapshot(
        "There is no data set owner/name on the Hub, or it is private.\n"
        "Check the name; a local path starts with ./ or /."
    )


@pytest.mark.parametrize("wrap", [False, True])
def test_a_wrong_revision_is_told_apart(wrap: bool) -> None:
    error = http_error(RevisionNotFoundError, 404)
    text = message(wrapped(error, OSError("no file")) if wrap else error)
    assert plain(text) == snapshot(
        "The model owner/name has no such revision.\n"
        "See https://huggingface.co/owner/name for those there are."
    )


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("not in the cache"),
        OfflineModeIsEnabled("HF_HUB_OFFLINE is on"),
        httpx.ConnectError("no route"),
        httpx.ReadTimeout("slow"),
        httpx2.ConnectTimeout("slow"),
        wrapped(httpx2.ProxyError("no proxy"), OSError("We couldn't connect to the Hub")),
        ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)"),
        wrapped(httpx.ConnectError("no route"), OSError("We couldn't connect to the Hub")),
        wrapped(LocalEntryNotFoundError("not in the cache"), OSError("We couldn't connect to the Hub")),
    ],
    ids=repr,
)
def test_no_network_is_told_apart(error: Exception) -> None:
    assert plain(message(error)) == snapshot(
        "The model owner/name is not on this machine and the Hub cannot be reached.\n"
        "Check the network (and HF_HUB_OFFLINE), or give a local path that starts with ./ or /."
    )


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("x"), OSError("disk"), ValueError("x"), UserError("mine"), KeyboardInterrupt()],
    ids=repr,
)
def test_every_other_error_passes_through_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("model", "owner/name"):
        raise error
    assert caught.value is error


def test_a_user_error_passes_through_even_where_a_hub_error_caused_it() -> None:
    error = wrapped(OfflineModeIsEnabled("off"), UserError("mine"))
    with pytest.raises(UserError, match="^mine$"), hub_errors("model", "owner/name"):
        raise error


def test_no_error_is_no_error(tmp_path: Path) -> None:
    with hub_errors("model", str(tmp_path)):
        pass


def test_any_other_answer_of_the_hub_is_told_with_its_number_and_no_token() -> None:
    said = message(http_error(HfHubHTTPError, 503), "data set")
    assert plain(said) == snapshot(
        "The Hub answered with error 503 when asked for the data set owner/name.\nTry again in a while."
    )


def test_a_message_shows_no_control_characters_and_no_half_of_a_pair() -> None:
    assert str(UserError("a\x1b[31m\x07b\x9bc\ud800\n\td")) == "a\\x1b[31m\\x07b\\x9bc\\ud800\n\td"


def test_what_nobody_reads_to_its_end_is_shortened() -> None:
    word, line = "w" * 10_000, "so " * 10_000
    told = str(UserError(f"The file {word} is none.\n{line}"))
    first, second = told.splitlines()
    assert first.startswith("The file www")
    assert first.endswith("www is none.")
    assert plain(first.replace("w", "")) == snapshot("The file [... 10,000 characters ...] is none.")
    assert plain(second.replace("so ", "")) == snapshot("[... 30,000 characters ...]o")
    assert len(told) < 3_000
    assert plain(shown("x" * 200), head="x" * 74, tail="x" * 24) == snapshot(
        "'<head>[... 202 characters ...]<tail>'"
    )
    assert plain(shown(16**5000)) == snapshot("a number of thousands of digits")
    assert len(nearest("q" * 10_000, ["a"])) < 100
