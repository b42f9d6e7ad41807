"""Who may ask the live page: the browser that opened its address, on this machine."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner, Result

from januslens.cli.program import januslens
from tests.support.ui import TOKEN, LivePage

EVERYWHERE = "0.0.0.0"  # noqa: S104 - to be refused
LIST = ("POST", "/api/ListModels", "{}")


def test_the_page_itself_holds_no_secret(page: LivePage) -> None:
    with page.request("GET", "/") as answer:
        assert answer.status == 200
        assert page.token not in answer.read().decode()
        headers = {name.lower(): value for name, value in answer.getheaders()}
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_its_own_browser_is_answered(page: LivePage) -> None:
    for origin in (page.origin, f"http://localhost:{page.port}"):
        headers = {TOKEN: page.token, "Origin": origin, "Host": origin.removeprefix("http://")}
        with page.request(*LIST, headers) as answer:
            assert answer.status == 200
            assert "models" in json.loads(answer.readline())


@pytest.mark.parametrize("token", [None, "", "wrong", "é"])
def test_without_the_token_nothing_is_called(page: LivePage, token: str | None) -> None:
    with page.request(*LIST, {} if token is None else {TOKEN: token}) as answer:
        assert answer.status == 403
        assert json.load(answer)["error"]["code"] == "PERMISSION_DENIED"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", EVERYWHERE, ""])
def test_a_name_that_was_rebound_to_this_host_is_refused(page: LivePage, host: str) -> None:
    named = f"{host}:{page.port}" if host else ""
    for method, path, body in (LIST, ("GET", "/", "")):
        with page.request(method, path, body, {TOKEN: page.token, "Host": named}) as answer:
            assert answer.status == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://{own}", "http://{own}0"]
)
def test_another_sites_requests_are_refused(page: LivePage, origin: str) -> None:
    foreign = origin.format(own=f"{page.host}:{page.port}")
    for method, path, body in (LIST, ("GET", "/", "")):
        with page.request(method, path, body, {TOKEN: page.token, "Origin": foreign}) as answer:
            assert answer.status == 403
            assert "access-control-allow-origin" not in dict(answer.getheaders())


def test_preflights_allow_nothing(page: LivePage) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Headers": TOKEN}
    with page.request("OPTIONS", "/api/Trace", "", asked) as answer:
        assert answer.status == 403


def run(*arguments: str) -> Result:
    return CliRunner().invoke(januslens, ["ui", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "192.0.2.1 is not loopback"),
        (EVERYWHERE, "0.0.0.0 means all"),
        ("::", ":: means all"),
    ],
)
def test_other_hosts_than_loopback_are_refused(host: str, words: str) -> None:
    result = run("--host", host, "--port", "0")
    assert result.exit_code == 2
    assert words in result.stderr


def test_exposing_is_allowed_on_request_but_never_everywhere() -> None:
    result = run("--host", "192.0.2.1", "--port", "0", "--expose")  # an address of nobody's
    assert (result.exit_code, "cannot listen on 192.0.2.1" in result.stderr) == (1, True)
    result = run("--host", EVERYWHERE, "--port", "0", "--expose")
    assert (result.exit_code, "means all" in result.stderr) == (2, True)


def test_a_taken_port_is_named(page: LivePage) -> None:
    result = run("--port", str(page.port))
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{page.port}" in result.stderr


def test_without_its_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    result = CliRunner().invoke(januslens, ["ui"])
    assert "pip install 'januslens[ui]'" in str(result.exception)
