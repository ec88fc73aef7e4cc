"""The real app behind a password, and behind a secret in its address: what a program gets in with, and what stays shut."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from gradio_client import Client

AUTH = ("me", "se:cret")


@pytest.fixture(scope="module")
def behind_password(
    open_app: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("password")
    (folder / "auth").write_text(":".join(AUTH))
    (folder / "runs").mkdir()
    with open_app(folder / "runs", "--auth-file", str(folder / "auth")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def behind_token(
    open_app: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    runs_dir = tmp_path_factory.mktemp("token")
    with open_app(runs_dir, "--token") as (address, _):
        printed = ""
        while "token=" not in printed:
            printed = (runs_dir / ".app.txt").read_text()
        match = re.search(r"(\S+)/\?token=(\S+)", printed)
        assert match, printed
        assert match[1] == address
        yield address, match[2]


def test_a_program_logs_in(behind_password: str) -> None:
    client = Client(behind_password, auth=AUTH, verbose=False, ssl_verify=False)
    assert "tiny" in [preset["preset"] for preset in client.predict(api_name="/list_presets")]


@pytest.mark.parametrize(
    "path",
    [
        "/openapi.json",
        "/docs",
        "/redoc",
        "/config",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/monitoring/x",
    ],
)
def test_nothing_is_told_before_the_login(behind_password: str, path: str) -> None:
    assert httpx.get(behind_password + path).status_code == 401
    assert httpx.get(behind_password).status_code == 200, "the login page"


def test_the_login_s_cookies_are_strict_and_a_wrong_password_is_slow(behind_password: str) -> None:
    tried = [
        httpx.post(f"{behind_password}/login", data={"username": "me", "password": f"{number}"}).status_code
        for number in range(7)
    ]
    assert tried[0] == 400
    assert tried[-1] == 429
    # The pause is over a moment later, and the right password opens.
    for _ in range(20):
        answer = httpx.post(f"{behind_password}/login", data={"username": AUTH[0], "password": AUTH[1]})
        if answer.status_code != 429:
            break
        time.sleep(float(answer.headers["retry-after"]))
    assert answer.status_code == 200
    cookies = answer.headers.get_list("set-cookie")
    assert len(cookies) == 2
    assert all("SameSite=Strict" in cookie and "HttpOnly" in cookie for cookie in cookies)


def test_the_address_with_its_secret_opens_the_page(behind_token: tuple[str, str]) -> None:
    address, secret = behind_token
    with httpx.Client() as browser:
        assert browser.get(address).status_code == 401
        assert browser.get(f"{address}/?token=x").status_code == 401
        assert 'url=/"' in browser.get(f"{address}/?token={secret}").text
        assert "gradio_config" in browser.get(address).text


def test_a_program_gives_the_secret_as_a_header(behind_token: tuple[str, str]) -> None:
    address, secret = behind_token
    client = Client(address, headers={"Authorization": f"Bearer {secret}"}, verbose=False, ssl_verify=False)
    assert "tiny" in [preset["preset"] for preset in client.predict(api_name="/list_presets")]
