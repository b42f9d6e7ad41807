"""A caller and what the operator grants to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

# A caller's name stands in logs as it is.
NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class TokenHash:
    """What is kept of a bearer token: it cannot be got back. Refused from `expires` on."""

    sha256: bytes
    expires: datetime | None = None


@dataclass(frozen=True)
class Quotas:
    """What a caller may take at most; None = no limit."""

    requests_per_minute: float | None = None
    concurrent: int | None = None
    device_seconds_per_minute: float | None = None


@dataclass(frozen=True)
class Caller:
    """Someone who asks. `models` and `rpcs` of None are all of them."""

    name: str
    tokens: tuple[TokenHash, ...] = ()
    models: frozenset[str] | None = None
    rpcs: frozenset[str] | None = None
    quotas: Quotas = Quotas()

    def may_use(self, model: str) -> bool:
        """Whether this model is in the caller's scope."""
        return self.models is None or model in self.models

    def may_call(self, rpc: str) -> bool:
        """Whether this RPC is in the caller's scope."""
        return self.rpcs is None or rpc in self.rpcs


# Whoever asks a server that has no list of callers.
ANYONE = Caller("")
