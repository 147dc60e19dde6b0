"""How many micro-batches may be in flight, into how many the sequences are divided, and who else may come."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Numbers
from typing import Final

from functions.gateway.scheduling.row_costs import RowCosts, seconds_on

IN_FLIGHT_PER_INSTANCE: Final = 2
"""Micro-batches at each ready instance of the narrowest stage: above Knative's target, so that it grows under a backlog."""
MOST_FOR_A_NETWORK: Final = 4
"""Times as many at most for a network, whose seconds are estimates."""
_WORTH_MORE: Final = 1.08
"""Times the tokens a second that more micro-batches must bring: costs are estimates, and parting and joining costs, too."""
FAR: Final = 0.5
"""Share of a round's seconds at the stages that its network must take, for micro-batches to be divided for it."""


def micro_batches_allowed(
    ready_instances: Numbers[int], service_seconds: Numbers[float], network_seconds: Numbers[float] = ()
) -> int:
    """Micro-batches that may be in flight, at least one for each stage.

    ready_instances: per stage, how many take work; 0: unknown. service_seconds: per stage, of a step that does not wait, its
    way included; where one is 0, all are taken to be alike. network_seconds: of those, the way, which keeps no instance busy.
    The narrowest stage has the most seconds per instance. By Little's law its
    rate times the seconds of a whole round is what keeps it busy, and twice that is two at each of its instances, those on
    their way through the other stages not counted. Two per instance in the whole pipeline would leave it with little more
    than one, which is below the autoscaler's target: it would never grow (docs/scheduling.md has the numbers).
    """
    instances = [max(1, count) for count in ready_instances]
    seconds = service_seconds if all(service_seconds) else [1.0] * len(instances)
    busy = [each - way for each, way in zip(seconds, network_seconds, strict=True)] if network_seconds else seconds
    if not all(service_seconds) or min(busy) <= 0:
        busy = seconds
    rate = min(count / each for count, each in zip(instances, busy, strict=True))
    few = max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * rate * sum(seconds) - 1e-9))
    return min(few, MOST_FOR_A_NETWORK * max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * _near(instances, busy) - 1e-9)))


def _near(instances: Numbers[int], busy: Numbers[float]) -> float:
    """Micro-batches that keep the narrowest stage busy where there is no network."""
    return min(count / each for count, each in zip(instances, busy, strict=True)) * sum(busy)


def micro_batches_wanted(
    sequences: int, stages_at_once: int, most_sequences: int, allowed: int, filling: Callable[[int, int], int] | None = None
) -> int:
    """Into how many micro-batches so many sequences are divided: one for each stage that can compute at the same time first,
    then full ones, as many as allowed. filling: how many fill a network, from how many sequences and at least so many."""
    few = min(sequences, allowed, max(stages_at_once, math.ceil(sequences / most_sequences)))
    return few if filling is None or few < 1 else min(sequences, allowed, filling(sequences, few))


def sequences_beyond(running: int, allowed: int, most_sequences: int) -> int:
    """That could be taken into `allowed` micro-batches; below zero where fewer are allowed than there are."""
    return allowed * most_sequences - running


def most_waiting(queue_limit: int, beyond: int) -> int:
    """Whoever finds so many is refused. beyond: of `sequences_beyond`, who wait for nothing but the next step."""
    return queue_limit + max(0, beyond)


def micro_batches_that_fill(
    sequences: int, least: int, most: int, stages_at_once: int, costs: Numbers[RowCosts], network_seconds: float
) -> int:
    """As many as make the most tokens a second, where events are long on their way: while some travel, others compute.

    Smaller steps cost more a row, so that more micro-batches may also make fewer tokens: `costs`, measured, decide.
    """
    curves = [cost.points() for cost in costs]

    def rate(count: int) -> float:
        of_stages = [seconds_on(points, math.ceil(sequences / count)) or 0.0 for points in curves]
        computing = max(*of_stages, sum(of_stages) / stages_at_once)
        return sequences / max(count * computing, sum(of_stages) + network_seconds)

    if not all(curves):
        return least
    found = least
    for count in range(least + 1, min(most, sequences) + 1):
        if rate(count) > _WORTH_MORE * rate(found):
            found = count
    return found
