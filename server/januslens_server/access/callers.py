"""Read the callers' file, which docs/operations.md describes.

Tokens have 256 random bits and are stored as SHA-256 hashes. One round of hashing is enough,
because random tokens cannot be guessed from a dictionary. Unknown field names are refused, because
a misspelt scope would permit everything.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from januslens_server.validation import expectation, load_yaml, suggestion

# Characters that are safe in logs without escaping.
NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)
# Prefix by which scanners for leaked secrets find tokens.
TOKEN_PREFIX = "januslens_"  # noqa: S105 - not a secret

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# Errors may quote values of these fields. Other values are not quoted, because they may be tokens.
_QUOTABLE = {"name", "models", "rpcs", "admin", "quotas"}


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("expected 1 to 64 letters, digits, _ . : -")
    return name


def _to_hash(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise ValueError("expected 64 hexadecimal digits in quotes")
    return bytes.fromhex(value)


def _not_a_timestamp(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError("expected a date or a time such as 2027-01-31")  # noqa: TRY004 - pydantic's
    return value


def _in_utc(moment: datetime) -> datetime:
    """Convert to UTC: times without a zone are UTC, and a date is its first moment."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Name = Annotated[str, AfterValidator(_check_name)]
Sha256 = Annotated[bytes, BeforeValidator(_to_hash)]
Moment = Annotated[datetime, BeforeValidator(_not_a_timestamp), AfterValidator(_in_utc)]
Rate = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, strict=True)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenHash(_Entry):
    """SHA-256 hash of a bearer token, which is invalid from `expires` on."""

    sha256: Sha256
    expires: Moment | None = None


class Quotas(_Entry):
    """Limits of one caller; None means no limit."""

    requests_per_minute: Rate | None = None
    concurrent: Count | None = None
    device_seconds_per_minute: Rate | None = None
    generated_tokens_per_minute: Rate | None = None


class Caller(_Entry):
    """A caller with its tokens, scopes and quotas; `models` or `rpcs` None means all.

    `admin` permits the RPCs of AdminService, which `rpcs` does not contain.
    """

    name: Name
    tokens: tuple[TokenHash, ...]
    models: frozenset[str] | None = None
    rpcs: frozenset[str] | None = None
    admin: Annotated[bool, Field(strict=True)] = False
    quotas: Quotas = Quotas()

    @field_validator("rpcs")
    @classmethod
    def _check_rpcs(cls, rpcs: frozenset[str], info: ValidationInfo) -> frozenset[str]:
        known = (info.context or {}).get("rpcs", rpcs)
        if unknown := sorted(rpcs - set(known)):
            raise ValueError(f"unknown RPC {unknown[0]!r}; expected one of {', '.join(known)}")
        return rpcs

    def may_use(self, model: str) -> bool:
        """Whether this model is in the caller's scope."""
        return self.models is None or model in self.models

    def may_call(self, rpc: str) -> bool:
        """Whether this RPC is in the caller's scope."""
        return self.rpcs is None or rpc in self.rpcs


# The caller of all requests if there is no callers' file; with the scope `admin` if the operator
# allows models to be loaded.
ANYONE = Caller.model_construct(name="", tokens=())
ANY_ADMIN = ANYONE.model_copy(update={"admin": True})


class _File(_Entry):
    callers: tuple[Caller, ...]

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        names = [caller.name for caller in self.callers]
        hashes = [token.sha256 for caller in self.callers for token in caller.tokens]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"caller name {twice[0]!r} is used twice; give each its own name")
        if len(set(hashes)) < len(hashes):
            raise ValueError("a token hash is used twice; give each caller its own tokens")
        return self


def read_callers(path: Path, rpcs: Collection[str]) -> tuple[Caller, ...]:
    """Read the callers' file; `rpcs` are the names that scopes may contain.

    Raises `OSError` if the file cannot be read, and `ValueError` with one line per error. Each line
    names the place in the file, such as `callers.yaml: callers[0].name ...`.
    """
    content = load_yaml(path)
    try:
        return _File.model_validate(content, context={"rpcs": rpcs}).callers
    except ValidationError as error:
        lines = [f"{path}: {_one_line(details)}" for details in error.errors(include_url=False)]
        raise ValueError("\n".join(lines)) from error


def _one_line(error: ErrorDetails) -> str:
    location = error["loc"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    where = where.lstrip(".") or "top level"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        entries: dict[int, type[_Entry]] = {
            1: _File,
            3: Caller,
            4: Quotas,
            5: TokenHash,
        }  # by depth
        known = entries[len(location)].model_fields
        return f"{where} is not a known field{suggestion(str(location[-1]), known)}"
    quotable = len(location) > 2 and location[2] in _QUOTABLE  # callers, its number, the field
    value = f" {error['input']!r}" if quotable else ""
    return f"invalid {where}{value}: {expectation(error)}"


def new_token() -> str:
    """Create a random token."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """Return the SHA-256 hash of a token, as in a callers' file."""
    return hashlib.sha256(token.encode()).digest()


def find_token(token: str, callers: Iterable[Caller]) -> tuple[Caller, TokenHash] | None:
    """Return the caller with this token, after comparing with every token in constant time."""
    wanted = token_hash(token)
    found = None
    for caller in callers:
        for known in caller.tokens:
            if hmac.compare_digest(known.sha256, wanted):
                found = caller, known
    return found
