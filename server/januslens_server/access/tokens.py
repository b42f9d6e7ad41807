"""Bearer tokens: made at random, kept as hashes, compared in constant time.

A token has 256 random bits, so one round of SHA-256 is enough: there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from januslens_server.access.callers import Caller, TokenHash

# Lets scanners for leaked secrets find it.
PREFIX = "januslens_"


def new_token() -> str:
    """A token that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()


def holder(token: str, callers: Iterable[Caller]) -> tuple[Caller, TokenHash] | None:
    """Whose token this is; takes the same time whoever's it is."""
    shown = digest(token)
    found = None
    for caller in callers:
        for kept in caller.tokens:
            if hmac.compare_digest(kept.sha256, shown):
                found = caller, kept
    return found
