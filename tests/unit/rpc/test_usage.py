"""Usage lines of callers."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from januslens_server.rpc import usage
from januslens_server.rpc.usage import OTHERS, UsageBook, Use, seconds_to_midnight


def lines(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    return {record.__dict__["caller"]: record.__dict__ for record in caplog.records}


def test_a_line_has_the_totals_and_the_kinds_of_a_caller(caplog: pytest.LogCaptureFixture) -> None:
    book = UsageBook()
    with caplog.at_level(logging.INFO):
        book.add("ada", ("Trace", "demo", "PARTS"), Use(1, 0.5, tokens=8))
        book.add("ada", ("Trace", "demo", "PARTS"), Use(1, 0.25, tokens=2))
        book.add("ada", ("Intervene", "other", "STREAM"), Use(1, 1.0, tokens=4, experiments=30))
        book.add("", ("ListModels", "", ""), Use(1))
        book.write()
    found = lines(caplog)
    assert found.keys() == {"ada", OTHERS}
    totals = {"requests": 3, "device_seconds": 1.75, "tokens": 14, "experiments": 30}
    assert totals.items() <= found["ada"].items()
    assert "generated" not in found["ada"]
    assert found["ada"]["by_kind"] == {
        "Intervene/other/STREAM": {
            "requests": 1,
            "device_seconds": 1.0,
            "tokens": 4,
            "experiments": 30,
        },
        "Trace/demo/PARTS": {"requests": 2, "device_seconds": 0.75, "tokens": 10},
    }
    assert found[OTHERS]["by_kind"] == {"ListModels": {"requests": 1}}


def test_each_line_starts_from_0(caplog: pytest.LogCaptureFixture) -> None:
    book = UsageBook()
    book.add("ada", ("Trace", "demo", "PARTS"), Use(1))
    with caplog.at_level(logging.INFO):
        book.write()
        book.write()
        book.add("ada", ("Trace", "demo", "PARTS"), Use(1))
        book.write()
    first, second = (record.__dict__ for record in caplog.records)
    assert first["requests"] == second["requests"] == 1
    assert first["until"] <= second["since"]


async def test_lines_are_written_at_midnight(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evening = datetime(2026, 12, 31, 23, 59, 30, 500_000, tzinfo=UTC)
    assert seconds_to_midnight(evening) == 29.5
    assert seconds_to_midnight(datetime(2026, 1, 1, tzinfo=UTC)) == 86_400
    waits = iter([0.0, 3600.0])
    monkeypatch.setattr(usage, "seconds_to_midnight", lambda _now: next(waits))
    book = UsageBook()
    book.add("ada", ("Trace", "demo", "PARTS"), Use(1))
    with caplog.at_level(logging.INFO):
        task = asyncio.create_task(book.write_daily())
        async with asyncio.timeout(10):
            while not caplog.records:  # noqa: ASYNC110 - logging sets no event
                await asyncio.sleep(0)
        task.cancel()
    assert lines(caplog).keys() == {"ada"}
