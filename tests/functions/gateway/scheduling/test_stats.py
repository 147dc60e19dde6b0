"""What the scheduler counts."""

import random
import time

import pytest

from functions.gateway.scheduling.metrics import StageStats
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of
from tests.support.functions.stage_server import counting_stages


def test_what_a_step_takes_is_told_from_what_it_waits() -> None:
    dice = random.Random(3)
    stage = StageStats()
    for _ in range(500):
        stage.step(0.02 + dice.choice([0.0, 0.02, 0.06]), decode_tokens=1)
    assert 0.02 <= stage.service_seconds < 0.03
    for _ in range(500):
        stage.step(0.05 + dice.choice([0.0, 0.02, 0.06]), decode_tokens=1)
    assert 0.05 <= stage.service_seconds < 0.06


def test_what_steps_took_is_told_by_what_it_was_for_and_adds_up() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        for stage in stages:
            stage.seconds = 0.01
        began = time.perf_counter()
        assert tokens_of(submit(scheduler, [3, 4], 12)) == counted([3, 4], 12)
        took = time.perf_counter() - began
        stats = scheduler.stats()
    parts = stats.seconds_by_part()
    assert sum(parts.values()) == pytest.approx(stats.steps_seconds)
    assert 3 * 11 * 0.01 < parts["exchange"] < stats.steps_seconds <= took
    assert min(parts.values()) > 0
