"""What counts against a sequence, and what is forgiven."""

import time

from functions.gateway.scheduling.progress import Chunk
from functions.gateway.scheduling.sequence import RetryBudget


def test_strikes_count_breaks_at_one_place_and_accidents_are_forgiven() -> None:
    accident, poison = RetryBudget(), RetryBudget()
    for stage, position in ((0, 0), (1, 0), (1, 64), (0, 64), (2, 64), (1, 0)):
        accident.failed_at(stage, Chunk(position, 64, 2))
        assert accident.failures_here == 1
    for position in (0, 32, 60):
        poison.failed_at(1, Chunk(position, 64, 2))
    assert poison.failures_here == 3
    assert poison.exhausted
    assert not accident.exhausted
    for stage in (0, 1, 0):
        accident.failed_at(stage, Chunk(0, 64, 2))
    assert accident.exhausted, "nothing is tried for ever"
    accident.reset()
    assert not accident.exhausted


def test_each_replay_comes_later() -> None:
    suspect = RetryBudget()
    pauses = []
    for _ in range(3):
        suspect.failed_at(1, Chunk(0, 64, 2))
        pauses.append(suspect.retry_at - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[0] > 0
