"""Parse the callers' file: valid entries, and one error line per mistake."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from januslens_server.access.callers import (
    Caller,
    Quotas,
    TokenHash,
    find_token,
    new_token,
    read_callers,
    token_hash,
)

RPCS = ("Trace", "Tokenize")
HASH = "ab" * 32


def read(tmp_path: Path, text: str) -> tuple[Caller, ...]:
    path = tmp_path / "callers.yaml"
    path.write_text(text)
    return read_callers(path, RPCS)


def test_all_fields_of_a_caller_are_read(tmp_path: Path) -> None:
    ada, bob = read(
        tmp_path,
        f"""
        callers:
          - name: ada
            tokens:
              - sha256: {HASH}
                expires: 2027-01-31
              - sha256: {HASH[::-1]}
                expires: 2027-01-31 12:00:00+02:00
            models: [demo]
            rpcs: [Trace]
            quotas: {{requests_per_minute: 0.5, concurrent: 2, device_seconds_per_minute: 30}}
          - name: bob
            tokens: []
        """,
    )
    noon = datetime(2027, 1, 31, 12, tzinfo=timezone(timedelta(hours=2)))
    assert ada == Caller(
        name="ada",
        tokens=(
            TokenHash(sha256=bytes.fromhex(HASH), expires=datetime(2027, 1, 31, tzinfo=UTC)),
            TokenHash(sha256=bytes.fromhex(HASH[::-1]), expires=noon),
        ),
        models=frozenset({"demo"}),
        rpcs=frozenset({"Trace"}),
        quotas=Quotas(requests_per_minute=0.5, concurrent=2, device_seconds_per_minute=30),
    )
    assert ada.may_use("demo") > ada.may_use("other")
    assert ada.may_call("Trace") > ada.may_call("Tokenize")
    assert bob == Caller(name="bob", tokens=())
    assert bob.may_use("anything")
    assert bob.may_call("Tokenize")


def entry(**fields: Any) -> str:
    """A file with one caller."""
    usual = {"name": "ada", "tokens": [{"sha256": HASH}]}
    return yaml.safe_dump({"callers": [usual | fields]})


WRONG = {
    "empty": ("", "top level: expected fields by name"),
    "a list": ("- a", "top level: expected fields by name"),
    "not YAML": ("callers: [", "line 1, column 11: invalid YAML: expected the node content"),
    "unknown key": (
        "callers: []\ncaller: []",
        "caller is not a known field; did you mean 'callers'",
    ),
    "no callers": ("{}", "callers is missing"),
    "not a list": ("callers: 3", "callers: expected a list"),
    "empty name": (entry(name=""), "callers[0].name '': expected 1 to 64 letters"),
    "a line break": (entry(name="a\nb"), "callers[0].name 'a\\nb'"),
    "no tokens": ("callers: [{name: ada}]", "callers[0].tokens is missing"),
    "misspelt scope": (
        entry(model=["demo"]),
        "callers[0].model is not a known field; did you mean",
    ),
    "misspelt expiry": (entry(tokens=[{"sha256": HASH, "expire": 1}]), "did you mean 'expires'"),
    "misspelt quota": (entry(quotas={"concurent": 1}), "quotas.concurent is not a known field"),
    "token as hash": (
        entry(tokens=[{"sha256": "secret"}]),
        "callers[0].tokens[0].sha256: expected",
    ),
    "token as caller": ("callers: [secret]", "callers[0]: expected fields by name"),
    "token as list": (entry(tokens="secret"), "callers[0].tokens: expected a list"),
    "token beside": (entry(token="secret"), "callers[0].token is not a known field"),  # noqa: S106
    "token unquoted": ("callers: [\nsecret: ]]", "line 2, column 10: invalid YAML"),
    "a number": (entry(tokens=[{"sha256": 1}]), "sha256: expected 64 hexadecimal digits in quotes"),
    "not a time": (entry(tokens=[{"sha256": HASH, "expires": "soon"}]), "expires: expected a date"),
    "a timestamp": (entry(tokens=[{"sha256": HASH, "expires": 2027}]), "expires: expected a date"),
    "unknown RPC": (entry(rpcs=["Trade"]), "unknown RPC 'Trade'; expected one of Trace, Tokenize"),
    "models: one": (entry(models="demo"), "callers[0].models 'demo': expected a list"),
    "models: null": (entry(models=[None]), "callers[0].models[0] None: expected text"),
    "no quota": (entry(quotas={"concurrent": 0}), "concurrent 0: expected a number above 0"),
    "true": (entry(quotas={"requests_per_minute": True}), "True: expected a number"),
    "infinite": (entry(quotas={"requests_per_minute": float("inf")}), "expected a finite number"),
    "half a request": (
        entry(quotas={"concurrent": 1.5}),
        "concurrent 1.5: expected a whole number",
    ),
    "name twice": (
        yaml.safe_dump({"callers": [{"name": "a", "tokens": []}] * 2}),
        "caller name 'a' is used twice",
    ),
    "token twice": (entry(tokens=[{"sha256": HASH}] * 2), "a token hash is used twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_reported_in_one_line_without_secrets(name: str, tmp_path: Path) -> None:
    text, said = WRONG[name]
    with pytest.raises(ValueError, match=r"callers\.yaml") as refused:
        read(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_every_mistake_has_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name.*\n.*rpcs") as refused:
        read(tmp_path, entry(name="a b", rpcs=["Trade"]))
    assert all(line.startswith(f"{tmp_path}") for line in str(refused.value).splitlines())


def test_tokens_are_long_random_and_found_by_their_hash() -> None:
    tokens = [new_token() for _ in range(10)]
    assert len(set(tokens)) == 10
    assert all(len(token) == len("januslens_") + 43 for token in tokens)
    callers = [
        Caller(name=str(i), tokens=(TokenHash(sha256=token_hash(token)),))
        for i, token in enumerate(tokens)
    ]
    for caller, token in zip(callers, tokens, strict=True):
        assert find_token(token, callers) == (caller, caller.tokens[0])
    for wrong in ("", tokens[0][:-1], tokens[0] + "x", token_hash(tokens[0]).hex(), "\u00e9"):
        assert find_token(wrong, callers) is None
