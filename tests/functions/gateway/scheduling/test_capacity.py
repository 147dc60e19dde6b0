"""How many micro-batches may be in flight, and into how many the sequences are divided."""

import math

import pytest

from functions.gateway.scheduling.capacity import micro_batches_allowed, micro_batches_wanted


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
    assert micro_batches_wanted(sequences, stages_at_once=3, most_sequences=8, allowed=6) == wanted
