"""The average time of a round of the pipeline, and the average speed of prompts through it: a model of queues of passes.

A stage's pods compute one pass at a time. Micro-batches go round. A pod takes at most one event with prompt chunks at a time,
and a step waits for at most one of them, so a pod with both alternates. Pass times are constant, not exponential, so a round
takes the longer of two times: without any waiting, and as the narrowest stage allows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from functions.configuration.pass_times import PassTimes, pairs
from functions.stage.engine.event_queue import most_merged

_MAX_MERGE: Final = 4  # the default of LAMINA_MAX_MERGE
_SETTLED: Final = 24  # passes; after far fewer their sizes repeat
_SHARPNESS: Final = 8  # events wait at the narrowest stage, and at all stages that are nearly as narrow


@dataclass(frozen=True, slots=True)
class Overheads:
    """The costs of the real parts of an emulated run, as `measure_overheads` finds them."""

    pass_seconds: float = 0.0  # per pass, beyond the profile's time
    hop_seconds: float = 0.001  # from the end of a pass to the next stage's queue


@dataclass(frozen=True, slots=True)
class Work:
    """The work at one moment."""

    decoding: int  # sequences
    micro_batches: int  # that the decoding sequences form
    held_tokens: float  # keys and values of a decoding sequence, mean
    prompt_tokens: float  # still to be computed
    chunk_tokens: int  # upper bound in one pass


@dataclass(frozen=True, slots=True)
class Flow:
    """The speed at one moment."""

    round_seconds: float  # in which each decoding sequence gets a token
    prompt_tokens_per_second: float  # through the whole pipeline
    prompt_tokens_per_second_alone: float  # of one prompt, whose chunks pass one pod of each stage in turn
    fill_seconds: float  # from the reservation, which waits for a running pass, to a chunk's end at the last stage
    in_flight: tuple[float, ...]  # requests at each of the given stages
    busy_share: tuple[float, ...]  # of its pods' time


def flow(
    times: Sequence[PassTimes], ready: Sequence[int], work: Work, overheads: Overheads, alike: Sequence[int] | None = None
) -> Flow:
    """ready: pods of each stage, at least one. alike: the number of equal stages that each one stands for; None: 1 each."""
    many = alike or [1] * len(times)
    num_stages = sum(many)
    kinds = range(len(times))

    def total(of_kinds: Iterable[float]) -> float:
        return sum(each * count for each, count in zip(of_kinds, many, strict=True))

    rows = work.decoding / work.micro_batches if work.micro_batches else 0.0
    held = rows * work.held_tokens
    hop = overheads.hop_seconds
    step = [
        each.forward_seconds(rows, held, held) + each.logits_seconds(rows) + overheads.pass_seconds if rows else 0.0
        for each in times
    ]
    size = min(work.prompt_tokens, work.chunk_tokens)
    chunk = [
        each.forward_seconds(size, pairs(size, size), 2 * size) + each.logits_seconds(1) + overheads.pass_seconds
        if size
        else 0.0
        for each in times
    ]
    at_pod = [work.micro_batches / count for count in ready]
    unhindered = total(step) + num_stages * hop
    saved = [_merged(each, at_pod[k] if rows else 0.0, num_stages, rows, held, size, overheads) for k, each in enumerate(times)]
    busy_step, busy_chunk = ([each * share for each, share in zip(of, saved, strict=True)] for of in (step, chunk))
    round_seconds = max(unhindered, *(at_pod[k] * busy_step[k] for k in kinds)) if rows else 0.0
    rate = 0.0
    if size:
        # When a chunk comes, each stage has its part of the micro-batches waiting.
        left = [1 - at_pod[k] * busy_step[k] / round_seconds if rows else 1.0 for k in kinds]
        share = [max(left[k], busy_chunk[k] / (busy_chunk[k] + max(1.0, at_pod[k] / num_stages) * busy_step[k])) for k in kinds]
        rate = min(ready[k] * share[k] / busy_chunk[k] for k in kinds)
    taken = [rate * busy_chunk[k] / ready[k] for k in kinds]
    if rows:
        unhindered += total(taken[k] * chunk[k] / 2 for k in kinds)
        bound = [at_pod[k] * busy_step[k] / max(0.05, 1 - taken[k]) for k in kinds]
        round_seconds = max(unhindered, *bound)
    slack = round_seconds - unhindered
    demand = [step[k] / ready[k] for k in kinds]
    narrowness = [(each / max(demand)) ** _SHARPNESS if rows else 0.0 for each in demand]
    in_flight = []
    for k in kinds:
        mine = 0.0
        if rows:
            here = step[k] + hop / 2 + taken[k] * chunk[k] / 2 + slack * narrowness[k] / total(narrowness)
            mine += work.micro_batches * here / round_seconds
        if size:
            mine += min(ready[k], rate * (chunk[k] + hop / 2 + min(1.0, at_pod[k]) * step[k]))
        in_flight.append(mine)
    # The next chunk is sent after the gateway got the reply for the last one.
    alone = hop + max((chunk[k] + (step[k] if rows else 0.0) for k in kinds), default=0.0)
    reservation = hop + (max(step) / 2 if rows else 0.0)
    busy = [min(1.0, taken[k] + (at_pod[k] * busy_step[k] / round_seconds if rows else 0.0)) for k in kinds]
    return Flow(
        round_seconds=round_seconds,
        prompt_tokens_per_second=rate * size,
        prompt_tokens_per_second_alone=size / alone if size else 0.0,
        fill_seconds=reservation + total(chunk) + num_stages * hop + total(min(1.0, at_pod[k]) * step[k] / 2 for k in kinds),
        in_flight=tuple(in_flight),
        busy_share=tuple(busy),
    )


def _merged(
    times: PassTimes, steps: float, num_stages: int, rows: float, held: float, size: float, overheads: Overheads
) -> float:
    """The share of a busy pod's time that remains when waiting events are merged into one pass."""
    events = steps + (1 if size else 0)
    passes = events / _at_once(events, num_stages)
    if passes == events:
        return 1.0

    def seconds(of_steps: float, of_chunks: float) -> float:
        tokens = of_steps * rows + of_chunks * size
        reads = of_steps * held + of_chunks * 2 * size
        attended = of_steps * held + of_chunks * pairs(size, size)
        return (
            times.forward_seconds(tokens, attended, reads)
            + times.logits_seconds(of_steps * rows + of_chunks)
            + overheads.pass_seconds
        )

    each_alone = (steps * seconds(1, 0) if rows else 0.0) + (seconds(0, 1) if size else 0.0)
    return passes * seconds(steps / passes, (1 if size else 0) / passes) / each_alone


def _at_once(events: float, num_stages: int) -> float:
    """Mean number of events in a pass of a pod with so many events going round; at least one."""
    few = max(1, int(events))
    if events <= few:
        return _mean_merged(few, num_stages)
    return (1 - events + few) * _mean_merged(few, num_stages) + (events - few) * _mean_merged(few + 1, num_stages)


@cache
def _mean_merged(events: int, num_stages: int) -> float:
    computed, merged = 1, []
    for _ in range(_SETTLED):
        computed = most_merged(events - computed, num_stages, _MAX_MERGE) or 1
        merged.append(computed)
    return sum(merged) / len(merged)
