"""Computes how many micro-batches there may be, how many the sequences need, and how many instances each stage lacks.

Pure functions of counts and measured seconds: the scheduler, `knative plan` and the simulator in bench/evaluation share them.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

from functions.gateway.scheduling.stats import RowCosts, seconds_on

IN_FLIGHT_PER_INSTANCE: Final = 2  # micro-batches per instance of the narrowest stage: above Knative's target, so that it grows
FAR_SHARE: Final = 0.5  # the network must take this share of the stages' seconds before micro-batches are divided for it
_MAX_FACTOR_FOR_NETWORK: Final = 4  # bounds micro-batches added for a network, whose seconds are estimates
_MIN_RATE_GAIN: Final = 1.08  # factor that dividing further must gain in tokens/s: costs are estimates, and dividing costs


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of the scheduler, from the configuration. functions/configuration/config.py explains each setting."""

    queue_limit: int = 256
    chunk_tokens: int = 256
    micro_batch_sequences: int = 8
    prompt_bytes: int = 64 * 2**20
    stages_at_once: int = 0  # 0: all
    draft_tokens: int = 0  # 0: no speculation
    cold_start_timeout_seconds: float = 300.0
    prompt_seconds: float = math.inf  # how long prompts may wait at a stage before it lacks instances


def micro_batches_allowed(
    ready_instances: Items[int], service_seconds: Items[float], network_seconds: Items[float] = ()
) -> int:
    """Returns how many micro-batches may be in flight: at least one for each stage.

    `ready_instances` has per stage the number of instances that take work, 0 if unknown. `service_seconds` has per stage the
    seconds of a step that does not wait, network included. If one of them is 0 (not measured), all stages count as equal.
    `network_seconds` has per stage the part of `service_seconds` in which no instance computes. It is empty if the network is
    quick.

    The narrowest stage is the one with the most busy seconds per instance. Each of its instances shall have
    IN_FLIGHT_PER_INSTANCE micro-batches while others are at other stages. By Little's law this takes the stage's rate, times
    the seconds of a whole round, times that constant. With fewer micro-batches the stage's concurrency would stay below the
    autoscaler's target, and the stage would never grow.
    """
    instances = [max(1, count) for count in ready_instances]
    seconds = busy = service_seconds if all(service_seconds) else [1.0] * len(instances)
    if network_seconds and all(service_seconds):
        computing = [each - network for each, network in zip(seconds, network_seconds, strict=True)]
        busy = computing if min(computing) > 0 else seconds
    rate = min([count / each for count, each in zip(instances, busy, strict=True)])
    wanted = max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * rate * sum(seconds) - 1e-9))
    without_network = max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * rate * sum(busy) - 1e-9))
    return min(wanted, _MAX_FACTOR_FOR_NETWORK * without_network)


def micro_batches_wanted(
    sequences: int, stages_at_once: int, max_sequences: int, allowed: int, filling: Callable[[int, int], int] | None = None
) -> int:
    """Returns into how many micro-batches this number of sequences is divided, at most `allowed`.

    There is one for each stage that can compute at the same time (`stages_at_once`), and more if one would have over
    `max_sequences`. `filling` gets the number of sequences and this minimum, and returns how many micro-batches keep a slow
    network busy. If `filling` is None, the network is quick.
    """
    wanted = min(sequences, allowed, max(stages_at_once, math.ceil(sequences / max_sequences)))
    return wanted if filling is None or wanted < 1 else min(sequences, allowed, filling(sequences, wanted))


def lacking_instances(
    prompt_tokens: float, token_seconds: Items[float], ready_instances: Items[int], most_seconds: float
) -> list[int]:
    """Returns per stage how many more instances it needs to compute the waiting prompts within `most_seconds`.

    `prompt_tokens` are those that no stage has computed. `token_seconds` has per stage the seconds of one prompt token in a
    large pass. A stage with 0 (unknown) lacks none. Every stage is judged alone, so that all lacking stages show at once. The
    narrowest stage holds prompts back from the others, which would otherwise seem to lack instances one after the other.
    """
    return [
        max(0, math.ceil(prompt_tokens * seconds / most_seconds) - max(1, count))
        for seconds, count in zip(token_seconds, ready_instances, strict=True)
    ]


def micro_batches_that_fill(
    sequences: int, minimum: int, maximum: int, stages_at_once: int, costs: Items[RowCosts], network_seconds: float
) -> int:
    """Returns how many micro-batches, from `minimum` to `maximum`, make the most tokens per second on a slow network.

    More micro-batches let some compute while others travel. But smaller steps cost more for each row, so the measured costs
    decide. Returns `minimum` if a stage has no measurements. `costs` has one item per stage. `network_seconds` is the time of a
    whole round.
    """
    curves = [cost.points() for cost in costs]
    if not all(curves):
        return minimum

    def rate(count: int) -> float:
        stage_seconds = [seconds_on(points, math.ceil(sequences / count)) or 0.0 for points in curves]
        computing = max(*stage_seconds, sum(stage_seconds) / stages_at_once)
        return sequences / max(count * computing, sum(stage_seconds) + network_seconds)

    best = minimum
    for count in range(minimum + 1, min(maximum, sequences) + 1):
        if rate(count) > _MIN_RATE_GAIN * rate(best):
            best = count
    return best
