"""Access to the live page: only from the browser that opened its address."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner, Result

from januslens.cli.program import januslens
from tests.support.ui import TOKEN, LivePage

WILDCARD = "0.0.0.0"  # noqa: S104 - must be rejected
LIST = ("POST", "/api/ListModels", "{}")


def test_page_contains_no_access_token(page: LivePage) -> None:
    with page.request("GET", "/") as response:
        assert response.status == 200
        assert page.token not in response.read().decode()
        headers = {name.lower(): value for name, value in response.getheaders()}
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_requests_of_the_page_itself_are_accepted(page: LivePage) -> None:
    for origin in (page.origin, f"http://localhost:{page.port}"):
        headers = {TOKEN: page.token, "Origin": origin, "Host": origin.removeprefix("http://")}
        with page.request(*LIST, headers) as response:
            assert response.status == 200
            assert "models" in json.loads(response.readline())


@pytest.mark.parametrize("token", [None, "", "wrong", "é"])
def test_wrong_token_is_rejected(page: LivePage, token: str | None) -> None:
    with page.request(*LIST, {} if token is None else {TOKEN: token}) as response:
        assert response.status == 403
        assert json.load(response)["error"]["code"] == "PERMISSION_DENIED"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", WILDCARD, ""])
def test_foreign_host_name_is_rejected(page: LivePage, host: str) -> None:
    named = f"{host}:{page.port}" if host else ""
    for method, path, body in (LIST, ("GET", "/", "")):
        with page.request(method, path, body, {TOKEN: page.token, "Host": named}) as response:
            assert response.status == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://{own}", "http://{own}0"]
)
def test_request_from_another_site_is_rejected(page: LivePage, origin: str) -> None:
    foreign = origin.format(own=f"{page.host}:{page.port}")
    for method, path, body in (LIST, ("GET", "/", "")):
        with page.request(method, path, body, {TOKEN: page.token, "Origin": foreign}) as response:
            assert response.status == 403
            assert "access-control-allow-origin" not in dict(response.getheaders())


def test_preflight_is_rejected(page: LivePage) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Headers": TOKEN}
    with page.request("OPTIONS", "/api/Trace", "", asked) as response:
        assert response.status == 403


def run(*arguments: str) -> Result:
    return CliRunner().invoke(januslens, ["ui", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("192.0.2.1", "192.0.2.1 is not loopback"),
        (WILDCARD, "0.0.0.0 is a wildcard address"),
        ("::", ":: is a wildcard address"),
    ],
)
def test_host_outside_loopback_is_rejected(host: str, text: str) -> None:
    result = run("--host", host, "--port", "0")
    assert result.exit_code == 2
    assert text in result.stderr


def test_expose_allows_one_address_but_no_wildcard() -> None:
    result = run("--host", "192.0.2.1", "--port", "0", "--expose")  # reserved for documentation
    assert (result.exit_code, "cannot listen on 192.0.2.1" in result.stderr) == (1, True)
    result = run("--host", WILDCARD, "--port", "0", "--expose")
    assert (result.exit_code, "is a wildcard address" in result.stderr) == (2, True)


def test_port_in_use_is_named_in_the_error(page: LivePage) -> None:
    result = run("--port", str(page.port))
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{page.port}" in result.stderr


def test_missing_libraries_name_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    result = CliRunner().invoke(januslens, ["ui"])
    assert "pip install 'januslens[ui]'" in str(result.exception)
