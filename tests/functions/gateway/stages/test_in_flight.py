"""Concurrency at an instance is weighted by time."""

import pytest

from functions.gateway.stages import routes
from functions.gateway.stages.routes import InFlight


def test_event_seconds_add_up_over_events_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(routes.time, "monotonic", lambda: now)
    instance = InFlight()
    now = 101.0
    with instance:
        now = 102.0
        with instance:
            now = 104.0
            assert instance.event_seconds() == pytest.approx(1 + 2 * 2)
        now = 105.0
    now = 200.0
    assert instance.event_seconds() == pytest.approx(1 + 2 * 2 + 1)
