"""The file of callers, as the operator writes it.

docs/operations.md shows one. Unknown names are refused: a scope that is misspelt would grant all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import yaml

from januslens_server.access.callers import NAME, Caller, Quotas, TokenHash

SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def read_callers(path: Path, rpcs: Collection[str]) -> tuple[Caller, ...]:
    """The callers in the file; `rpcs` are the names that a scope may have.

    Raises `ValueError` that says in one line what was expected where, `OSError` without a file.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return _callers(content, rpcs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _callers(content: Any, rpcs: Collection[str]) -> tuple[Caller, ...]:
    entries = _list(_fields(content, {"callers"}, "the file").get("callers"), "callers")
    callers = tuple(_caller(entry, f"callers[{i}]", rpcs) for i, entry in enumerate(entries))
    names = [caller.name for caller in callers]
    hashes = [token.sha256 for caller in callers for token in caller.tokens]
    if len(set(names)) < len(names):
        raise ValueError("expected a name of its own for each caller, got one twice")
    if len(set(hashes)) < len(hashes):
        raise ValueError("expected each token once, got one twice")
    return callers


def _caller(entry: Any, where: str, rpcs: Collection[str]) -> Caller:
    fields = _fields(entry, {"name", "tokens", "models", "rpcs", "quotas"}, where)
    name = fields.get("name")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(f"{where}.name: expected 1 to 64 letters, digits, _ . : -, got {name!r}")
    tokens = _list(fields.get("tokens"), f"{where}.tokens")
    return Caller(
        name=name,
        tokens=tuple(_token(token, f"{where}.tokens[{i}]") for i, token in enumerate(tokens)),
        models=_scope(fields.get("models"), f"{where}.models", None),
        rpcs=_scope(fields.get("rpcs"), f"{where}.rpcs", rpcs),
        quotas=_quotas(fields.get("quotas"), f"{where}.quotas"),
    )


def _token(entry: Any, where: str) -> TokenHash:
    fields = _fields(entry, {"sha256", "expires"}, where)
    text = fields.get("sha256")
    if not (isinstance(text, str) and SHA256.fullmatch(text)):
        # What was written here may be a token: it is not shown.
        raise ValueError(f"{where}.sha256: expected 64 hexadecimal digits in quotes")
    return TokenHash(bytes.fromhex(text), _moment(fields.get("expires"), f"{where}.expires"))


def _moment(value: Any, where: str) -> datetime | None:
    """YAML's dates and times; without a zone they are UTC, a date is its first moment."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime.combine(value, time(), tzinfo=UTC)
    raise ValueError(f"{where}: expected a date or a time such as 2027-01-31, got {value!r}")


def _scope(value: Any, where: str, known: Collection[str] | None) -> frozenset[str] | None:
    if value is None:
        return None
    names = _list(value, where)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected names, got {name!r}")  # noqa: TRY004 - the file is wrong
        if known is not None and name not in known:
            raise ValueError(f"{where}: expected some of {', '.join(known)}, got {name!r}")
    return frozenset(names)


def _quotas(value: Any, where: str) -> Quotas:
    if value is None:
        return Quotas()
    fields = _fields(value, set(Quotas.__dataclass_fields__), where)
    for name, limit in fields.items():
        whole = name == "concurrent"
        right = isinstance(limit, int if whole else (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (right and limit > 0):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{where}.{name}: expected {kind} above 0, got {limit!r}")
    return Quotas(**fields)


def _fields(value: Any, known: Collection[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected {', '.join(sorted(known))} by name")  # noqa: TRY004 - the file is wrong
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where}: expected some of {', '.join(sorted(known))}, got {unknown}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list")  # noqa: TRY004 - the file is wrong
    return value
