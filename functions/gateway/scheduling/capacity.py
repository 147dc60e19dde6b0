"""How many micro-batches may be in flight, and into how many the sequences are divided."""

import math
from collections.abc import Sequence as Numbers
from typing import Final

IN_FLIGHT_PER_INSTANCE: Final = 2
"""Micro-batches at each ready instance of the narrowest stage: above Knative's target, so that it grows under a backlog."""


def micro_batches_allowed(ready_instances: Numbers[int], service_seconds: Numbers[float]) -> int:
    """Micro-batches that may be in flight, at least one for each stage.

    ready_instances: per stage, how many take work; 0: unknown. service_seconds: per stage, of a step that does not wait;
    where one is 0, all are taken to be alike. The narrowest stage has the most seconds per instance. By Little's law its
    rate times the seconds of a whole round is what keeps it busy, and twice that is two at each of its instances, those on
    their way through the other stages not counted. Two per instance in the whole pipeline would leave it with little more
    than one, which is below the autoscaler's target: it would never grow (docs/scheduling.md has the numbers).
    """
    instances = [max(1, count) for count in ready_instances]
    seconds = service_seconds if all(service_seconds) else [1.0] * len(instances)
    rate = min(count / each for count, each in zip(instances, seconds, strict=True))
    return max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * rate * sum(seconds) - 1e-9))


def micro_batches_wanted(sequences: int, stages_at_once: int, most_sequences: int, allowed: int) -> int:
    """Into how many micro-batches so many sequences are divided: one for each stage that can compute at the same time first,
    then full ones, as many as allowed."""
    return min(sequences, allowed, max(stages_at_once, math.ceil(sequences / most_sequences)))
