"""What each caller used: one log line a day, and one when the server stops."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

logger = logging.getLogger(__name__)

# The name under which all callers outside the callers' file are counted.
OTHERS = "(others)"


@dataclass
class Use:
    """Sums over the calls of one kind."""

    requests: int = 0
    device_seconds: float = 0.0
    tokens: int = 0
    generated: int = 0
    experiments: int = 0

    def add(self, other: Use) -> None:
        """Add the figures of other calls."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


# A kind of calls: RPC, model and its level; the last two are empty for RPCs without a model.
Kind = tuple[str, str, str]


class UsageBook:
    """The use of each caller since the last line, by RPC, model and level.

    It is not thread-safe: use it in the event loop.
    """

    def __init__(self) -> None:
        self._since = datetime.now(UTC)
        self._uses: defaultdict[str, defaultdict[Kind, Use]] = defaultdict(lambda: defaultdict(Use))

    def add(self, caller: str, kind: Kind, use: Use) -> None:
        """Count a call of a caller; an empty name counts as `OTHERS`."""
        self._uses[caller or OTHERS][kind].add(use)

    def write(self) -> None:
        """Log one line for each caller with calls, and start from 0."""
        until = datetime.now(UTC)
        for caller, uses in sorted(self._uses.items()):
            total = Use()
            for use in uses.values():
                total.add(use)
            fields = {
                "caller": caller,
                "since": self._since.isoformat(timespec="seconds"),
                "until": until.isoformat(timespec="seconds"),
                **_shown(total),
                "by_kind": {
                    "/".join(filter(None, kind)): _shown(use) for kind, use in sorted(uses.items())
                },
            }
            logger.info("usage", extra=fields)
        self._uses.clear()
        self._since = until

    async def write_daily(self) -> None:
        """Write the lines of a day at midnight UTC, forever."""
        while True:
            await asyncio.sleep(seconds_to_midnight(datetime.now(UTC)))
            self.write()


def _shown(use: Use) -> dict[str, float]:
    """Return the figures that are not 0, with seconds rounded to microseconds."""
    return {name: round(value, 6) for name, value in asdict(use).items() if value}


def seconds_to_midnight(now: datetime) -> float:
    """Return the seconds until the next day begins in UTC."""
    tomorrow = now.date() + timedelta(days=1)
    return (datetime(tomorrow.year, tomorrow.month, tomorrow.day, tzinfo=UTC) - now).total_seconds()


# The calls of this process; a process has one log.
USAGE = UsageBook()
