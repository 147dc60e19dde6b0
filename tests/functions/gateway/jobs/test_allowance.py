"""How many lines are answered beside live traffic, by ticks that a test makes."""

import pytest

from functions.gateway.jobs import allowance
from functions.gateway.jobs.allowance import Allowance, Slot

MOST = 64


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "TICK_SECONDS", 0.001)


class Pipeline:
    """Begins as many lines as it has places; live requests may wait beside them."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.live = 0
        self.slots: list[Slot] = []
        self.allowance = Allowance(MOST, lambda: self.live + max(0, len(self.slots) - self.places))

    def fill(self) -> None:
        """As many lines enter as may."""
        full = False

        def look_once() -> bool:
            nonlocal full
            full, before = True, full
            return before

        while (slot := self.allowance.enter(look_once)) is not None:
            full = False
            self.slots.append(slot)
            number = len(self.slots)
            slot.is_waiting = lambda number=number: number > self.places  # type: ignore[misc]

    def tick(self, times: int = 1, least: int = 0) -> None:
        for _ in range(times):
            self.fill()
            self.allowance.tick(least)
            for slot in [slot for slot in self.slots if slot.preempted]:
                self.slots.remove(slot)
                self.allowance.leave(slot)


def test_lines_fill_what_the_pipeline_begins() -> None:
    pipeline = Pipeline(places=20)
    pipeline.tick(50)
    assert 20 <= len(pipeline.slots) <= 30
    free = Pipeline(places=1000)
    free.tick(50)
    assert len(free.slots) == MOST


def test_lines_make_way_for_live_requests_and_come_back() -> None:
    pipeline = Pipeline(places=40)
    pipeline.tick(50)
    before = list(pipeline.slots)
    pipeline.live = 1
    pipeline.tick()
    assert pipeline.slots == before, "a request that is begun at once takes no places"
    pipeline.tick()
    assert pipeline.slots == before[: len(before) // 2]
    pipeline.tick(20)
    assert pipeline.slots == []
    pipeline.live = 0
    pipeline.tick(50)
    assert len(pipeline.slots) >= 40


def test_a_late_batch_keeps_some_places() -> None:
    pipeline = Pipeline(places=40)
    pipeline.live = 1
    pipeline.tick(50, least=8)
    assert len(pipeline.slots) == 8


def test_a_line_that_shall_stop_gets_no_place() -> None:
    assert Allowance(MOST, lambda: 0).enter(lambda: True) is None
