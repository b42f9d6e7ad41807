"""The file of callers: what it may say, and the line with which it is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from januslens_server.access.callers import Caller, Quotas, TokenHash
from januslens_server.access.file import read_callers
from januslens_server.access.tokens import digest, holder, new_token

RPCS = ("Trace", "Tokenize")
HASH = "ab" * 32


def read(tmp_path: Path, text: str) -> tuple[Caller, ...]:
    path = tmp_path / "callers.yaml"
    path.write_text(text)
    return read_callers(path, RPCS)


def test_everything_that_a_caller_can_have(tmp_path: Path) -> None:
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
            TokenHash(bytes.fromhex(HASH), datetime(2027, 1, 31, tzinfo=UTC)),
            TokenHash(bytes.fromhex(HASH[::-1]), noon),
        ),
        models=frozenset({"demo"}),
        rpcs=frozenset({"Trace"}),
        quotas=Quotas(0.5, 2, 30),
    )
    assert ada.may_use("demo") > ada.may_use("other")
    assert ada.may_call("Trace") > ada.may_call("Tokenize")
    assert bob == Caller("bob")
    assert bob.may_use("anything")
    assert bob.may_call("Tokenize")


def entry(**fields: Any) -> str:
    """A file with one caller."""
    usual = {"name": "ada", "tokens": [{"sha256": HASH}]}
    return yaml.safe_dump({"callers": [usual | fields]})


WRONG = {
    "empty": ("", "the file: expected callers by name"),
    "a list": ("- a", "the file: expected callers by name"),
    "no YAML": ("callers: [", "while parsing"),
    "other names": ("users: []", "the file: expected some of callers, got ['users']"),
    "no list": ("callers: 3", "callers: expected a list"),
    "no name": (entry(name=""), "callers[0].name: expected 1 to 64 letters"),
    "a line break": (entry(name="a\nb"), "got 'a\\nb'"),
    "misspelt scope": (entry(model=["demo"]), "callers[0]: expected some of"),
    "no hash": (entry(tokens=[{"sha256": "secret"}]), "callers[0].tokens[0].sha256: expected 64"),
    "a number": (entry(tokens=[{"sha256": 1}]), "expected 64 hexadecimal digits in quotes"),
    "no time": (entry(tokens=[{"sha256": HASH, "expires": "soon"}]), "expires: expected a date"),
    "unknown RPC": (entry(rpcs=["Trade"]), "rpcs: expected some of Trace, Tokenize, got 'Trade'"),
    "models: one": (entry(models="demo"), "callers[0].models: expected a list"),
    "models: none": (entry(models=[None]), "callers[0].models: expected names, got None"),
    "no quota": (entry(quotas={"concurrent": 0}), "concurrent: expected a whole number above 0"),
    "true": (entry(quotas={"requests_per_minute": True}), "expected a number above 0, got True"),
    "half a request": (entry(quotas={"concurrent": 1.5}), "expected a whole number above 0"),
    "name twice": (yaml.safe_dump({"callers": [{"name": "a", "tokens": []}] * 2}), "got one twice"),
    "token twice": (entry(tokens=[{"sha256": HASH}] * 2), "expected each token once"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, said = WRONG[name]
    with pytest.raises(ValueError, match=r"callers\.yaml") as refused:
        read(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_tokens_are_long_random_and_found_by_their_hash() -> None:
    tokens = [new_token() for _ in range(10)]
    assert len(set(tokens)) == 10
    assert all(len(token) == len("januslens_") + 43 for token in tokens)
    callers = [Caller(str(i), (TokenHash(digest(token)),)) for i, token in enumerate(tokens)]
    for caller, token in zip(callers, tokens, strict=True):
        assert holder(token, callers) == (caller, caller.tokens[0])
    for wrong in ("", tokens[0][:-1], tokens[0] + "x", digest(tokens[0]).hex(), "\u00e9"):
        assert holder(wrong, callers) is None
