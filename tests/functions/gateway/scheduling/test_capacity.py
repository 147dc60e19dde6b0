"""How many micro-batches may be in flight, and into how many the sequences are divided."""

import math

import pytest

from functions.gateway.scheduling.batching import RowCosts, micro_batches_allowed, micro_batches_that_fill, micro_batches_wanted


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
def test_capacity_is_two_micro_batches_at_each_instance_of_the_narrowest_stage(
    ready: list[int], seconds: list[float], allowed: int
) -> None:
    assert micro_batches_allowed(ready, seconds) == allowed


def test_a_backlog_makes_the_pipeline_grow_where_it_is_narrow() -> None:
    """Admission and an autoscaler (target 1.4, a scale-down delay of five decisions) from one instance of each stage."""
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
    """Concurrency per stage and steps per second with so many in flight: mean value analysis."""
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
def test_sequences_are_divided_over_the_stages_before_micro_batches_are_filled(sequences: int, wanted: int) -> None:
    assert micro_batches_wanted(sequences, stages_at_once=3, max_sequences=8, allowed=6) == wanted


@pytest.mark.parametrize(
    ("way", "allowed"),
    [(0.0, 6), (0.01, 9), (0.02, 12), (1.0, 24)],
)
def test_a_way_keeps_no_stage_busy(way: float, allowed: int) -> None:
    assert micro_batches_allowed([1, 1, 1], [0.02 + way] * 3, [way] * 3) == allowed


def measured(by_tokens: dict[int, float]) -> list[RowCosts]:
    """Of three stages that are alike."""
    costs = [RowCosts() for _ in range(3)]
    for cost in costs:
        for tokens, seconds in by_tokens.items():
            cost.step(tokens, seconds)
    return costs


def test_a_far_network_is_filled_where_smaller_steps_do_not_cost_more_than_that_brings() -> None:
    dear, flat = measured({4: 0.007, 8: 0.010, 16: 0.016}), measured({4: 0.011, 8: 0.011, 16: 0.012})
    assert micro_batches_that_fill(16, 1, 6, 1, dear, 0.030) == 2, "one travels, one computes"
    assert micro_batches_that_fill(16, 1, 6, 1, dear, 0.500) == 1, "all wait for the way, however they are divided"
    assert micro_batches_that_fill(16, 1, 6, 1, dear, 0.001) == 1
    assert micro_batches_that_fill(16, 1, 6, 1, flat, 0.030) == 1, "halves cost as much as the whole"
    assert micro_batches_that_fill(16, 3, 6, 3, flat, 0.100) == 3, "all are on their way already"
    assert micro_batches_that_fill(16, 1, 6, 1, [RowCosts()] * 3, 0.1) == 1, "nothing is known yet"
