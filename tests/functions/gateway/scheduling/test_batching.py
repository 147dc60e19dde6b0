"""How many micro-batches there may be, how sequences are divided among them, and what steps are measured to cost."""

import math
import random
import time

import pytest

from functions.gateway.scheduling.batching import (
    lacking_instances,
    micro_batches_allowed,
    micro_batches_that_fill,
    micro_batches_wanted,
)
from functions.gateway.scheduling.stats import RowCosts, StageStats, seconds_on
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of
from tests.support.functions.stage_server import counting_stages


@pytest.mark.parametrize(
    ("ready", "seconds", "allowed"),
    [
        ([0, 0, 0], [0.0, 0.0, 0.0], 6),
        ([0, 0, 0], [0.02, 0.02, 0.0], 6),
        ([2, 1, 2], [0.0, 0.0, 0.0], 6),
        ([1, 1, 1], [0.02, 0.02, 0.02], 6),
        ([1, 1, 1], [0.04, 0.12, 0.04], 4),
        ([1, 2, 1], [0.04, 0.12, 0.04], 7),
        ([1, 11, 1], [0.04, 0.12, 0.04], 10),
        ([4, 11, 4], [0.04, 0.12, 0.04], 37),
        ([1], [0.1], 2),
        ([1, 1, 1, 1, 1], [0.001, 1.0, 0.001, 0.001, 0.001], 5),
    ],
)
def test_two_micro_batches_are_allowed_at_each_instance_of_the_narrowest_stage(
    ready: list[int], seconds: list[float], allowed: int
) -> None:
    assert micro_batches_allowed(ready, seconds) == allowed


@pytest.mark.parametrize(("network", "allowed"), [(0.0, 6), (0.01, 9), (0.02, 12), (1.0, 24)])
def test_network_seconds_keep_no_stage_busy(network: float, allowed: int) -> None:
    assert micro_batches_allowed([1, 1, 1], [0.02 + network] * 3, [network] * 3) == allowed


def test_a_backlog_makes_the_narrow_stage_grow() -> None:
    """Admission and an autoscaler (target 1.4, scale-down delay of five decisions), from one instance of each stage."""
    service = [0.04, 0.12, 0.04]
    decisions = [[1, 1, 1]]
    for _ in range(15):
        instances = [max(of_stage) for of_stage in zip(*decisions[-5:], strict=True)]
        concurrency, rate = _closed_network(service, instances, micro_batches_allowed(instances, service))
        decisions.append([min(12, math.ceil(busy / 1.4)) for busy in concurrency])
    assert instances[1] == 12
    assert max(instances[0], instances[2]) < 12
    assert rate >= 0.7 * 12 / 0.12


def _closed_network(service: list[float], instances: list[int], in_flight: int) -> tuple[list[float], float]:
    """Concurrency per stage and steps per second, by mean value analysis."""
    queue = [0.0] * len(service)
    rate = 0.0
    for population in range(1, in_flight + 1):
        seconds = [each * max(1.0, (1 + waiting) / n) for each, waiting, n in zip(service, queue, instances, strict=True)]
        rate = population / sum(seconds)
        queue = [rate * each for each in seconds]
    return queue, rate


@pytest.mark.parametrize(
    ("sequences", "wanted"), [(0, 0), (1, 1), (2, 2), (3, 3), (16, 3), (24, 3), (25, 4), (48, 6), (49, 6), (500, 6)]
)
def test_sequences_are_spread_over_the_stages_before_micro_batches_are_filled(sequences: int, wanted: int) -> None:
    assert micro_batches_wanted(sequences, stages_at_once=3, max_sequences=8, allowed=6) == wanted


def measured(by_tokens: dict[int, float]) -> RowCosts:
    costs = RowCosts()
    for tokens, seconds in by_tokens.items():
        costs.step(tokens, seconds)
    return costs


STEEP, FLAT = measured({4: 0.007, 8: 0.010, 16: 0.016}), measured({4: 0.011, 8: 0.011, 16: 0.012})


@pytest.mark.parametrize(
    ("minimum", "stages_at_once", "costs", "network_seconds", "wanted"),
    [
        pytest.param(1, 1, STEEP, 0.030, 2, id="one travels, one computes"),
        pytest.param(1, 1, STEEP, 0.500, 1, id="all wait for the network, however they are divided"),
        pytest.param(1, 1, STEEP, 0.001, 1, id="the network is quick"),
        pytest.param(1, 1, FLAT, 0.030, 1, id="halves cost as much as the whole"),
        pytest.param(3, 3, FLAT, 0.100, 3, id="all are travelling already"),
        pytest.param(1, 1, RowCosts(), 0.1, 1, id="nothing is measured"),
    ],
)
def test_a_slow_network_is_filled_if_smaller_steps_cost_less_than_that_gains(
    minimum: int, stages_at_once: int, costs: RowCosts, network_seconds: float, wanted: int
) -> None:
    assert micro_batches_that_fill(16, minimum, 6, stages_at_once, [costs] * 3, network_seconds) == wanted


# Costs of rows.


def test_costs_follow_quick_steps_and_are_interpolated() -> None:
    costs = RowCosts()
    assert seconds_on(costs.points(), 1) is None
    for waited in [0.03, 0.0, 0.05, 0.0, 0.0, 0.0] + [0.0] * 20:
        costs.step(1, 0.010 + waited)
        costs.step(16, 0.040 + waited)
    for tokens, seconds in ((1, 0.010), (16, 0.040), (8, 0.024)):
        assert seconds_on(costs.points(), tokens) == pytest.approx(seconds, rel=0.1)


def test_costs_that_are_unknown_or_old_are_assumed_to_be_low() -> None:
    costs = measured({1: 0.010})
    assert seconds_on(costs.points(), 9) == pytest.approx(0.010 * 1.16)
    costs.step(9, 0.100)
    assert seconds_on(costs.points(), 9) == pytest.approx(0.100)
    for _ in range(3000):
        costs.step(1, 0.010)
    assert seconds_on(costs.points(), 9) == pytest.approx(0.010 * 1.16)


def test_service_seconds_do_not_count_waiting() -> None:
    dice = random.Random(3)
    stage = StageStats()
    for service in (0.02, 0.05):
        for _ in range(500):
            stage.step(service + dice.choice([0.0, 0.02, 0.06]), decode_tokens=1)
        assert service <= stage.service_seconds < service + 0.01


def test_seconds_of_steps_are_split_into_parts_that_add_up() -> None:
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


def test_all_stages_that_would_be_late_lack_instances_at_once() -> None:
    """20,000 tokens of prompts within a second: 0.1 ms a token takes two instances, 0.2 ms four. One stage was not measured."""
    seconds = [0.0001, 0.0002, 0.0]
    assert lacking_instances(20_000, seconds, [1, 1, 1], 1.0) == [1, 3, 0]
    assert lacking_instances(20_000, seconds, [2, 3, 1], 1.0) == [0, 1, 0]
    assert lacking_instances(5_000, seconds, [0, 0, 0], 1.0) == [0, 0, 0]
