"""Statistics of the scheduler: measured seconds of steps at each stage, and counts of tokens, sequences and replays."""

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

_QUICKER_WEIGHT: Final = 0.3  # weight of a new measurement that is quicker than the estimate
_SLOWER_WEIGHT: Final = 0.01  # weight of a slower one: waiting makes steps slow, nothing makes them quick
_SLOWER_COST_WEIGHT: Final = 0.02  # the same for costs of rows
_SIZE_LIMITS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sizes up to each limit are taken as alike
_FEWEST_PROMPT_TOKENS: Final = 32  # smaller passes do not measure the speed of prompts
_PROMPT_WEIGHT: Final = 0.2  # weight of the newest pass in the seconds of a prompt token
_ASSUMED_TOKEN_COST: Final = 0.02  # share of a step that one more token is assumed to cost beyond all measured sizes
_MAX_AGE_STEPS: Final = 2_000  # older measurements are dropped, so that their size is tried again


@dataclass(slots=True)
class _Measured:
    tokens: float
    seconds: float
    at_step: int


@dataclass(slots=True)
class RowCosts:
    """Measured seconds of one stage's steps or passes, by the number of tokens.

    The seconds are not proportional to the tokens: four tokens often cost hardly more than one, but sixteen cost more.
    """

    _measured: dict[int, _Measured] = field(default_factory=dict)  # by index in _SIZE_LIMITS
    _steps: int = 0

    def step(self, tokens: int, seconds: float) -> None:
        """Adds a measured decode step of `tokens` tokens to the estimates."""
        self._steps += 1
        size = bisect_left(_SIZE_LIMITS, tokens)
        old = self._measured.get(size)
        if old is None or self._steps - old.at_step > _MAX_AGE_STEPS:
            self._measured[size] = _Measured(tokens, seconds, self._steps)
            return
        weight = _QUICKER_WEIGHT if seconds < old.seconds else _SLOWER_COST_WEIGHT
        old.seconds += weight * (seconds - old.seconds)
        old.tokens += weight * (tokens - old.tokens)
        old.at_step = self._steps

    def points(self) -> list[tuple[float, float]]:
        """Returns (tokens, seconds) for each step size that was measured lately, both ascending.

        A step that took longer than a larger one must have waited, so it gets the larger one's seconds. Raising the larger one
        instead would be wrong: one slow step of a rare size would make all further tokens look free.
        """
        points: list[tuple[float, float]] = []
        for size in sorted(self._measured, reverse=True):
            measured = self._measured[size]
            if self._steps - measured.at_step <= _MAX_AGE_STEPS and (not points or measured.tokens < points[-1][0]):
                points.append((measured.tokens, min(measured.seconds, points[-1][1] if points else math.inf)))
        return points[::-1]


def seconds_on(points: Items[tuple[float, float]], tokens: int) -> float | None:
    """Estimates the seconds of a step of `tokens` tokens by interpolation. Returns None if `points` is empty.

    `points` are those that `RowCosts.points` returns.
    """
    if not points:
        return None
    if tokens <= points[0][0]:
        return points[0][1] / (1 + _ASSUMED_TOKEN_COST * (points[0][0] - tokens))
    for (fewer, less), (more, longer) in pairwise(points):
        if tokens <= more:
            return less + (longer - less) * (tokens - fewer) / (more - fewer)
    last, seconds = points[-1]
    return seconds * (1 + _ASSUMED_TOKEN_COST * (tokens - last))


@dataclass(slots=True)
class StageStats:
    """Counters and estimates of one stage, measured by the gateway since its start."""

    steps: int = 0
    seconds: float = 0.0  # of all steps, from request to reply: network, queueing and compute
    exchange_seconds: float = 0.0  # part of `seconds`: from the request's first byte to the reply's last
    service_seconds: float = 0.0  # a decode step that does not wait, network included; moving estimate, 0: unknown
    network_seconds: float = 0.0  # an event's way to the stage and back; moving estimate
    costs: RowCosts = field(default_factory=RowCosts)  # decode steps at the stage, without the network
    passes: RowCosts = field(default_factory=RowCosts)  # forward passes at the stage, without queueing
    prompt_token_seconds: float = 0.0  # of a token in passes with prompt chunks; moving average, 0: unknown

    def step(
        self, seconds: float, decode_tokens: int, exchange_seconds: float = 0.0, engine_seconds: float | None = None
    ) -> None:
        """Adds a step that took `seconds` from request to reply.

        `decode_tokens` includes draft tokens. It is 0 for prompt chunks, whose times are only summed. `exchange_seconds` is the
        time from the request's first byte to the reply's last. `engine_seconds` is the time of queueing and compute that the
        stage reports. It is None if the stage reports none.
        """
        self.steps += 1
        self.seconds += seconds
        self.exchange_seconds += exchange_seconds
        if decode_tokens:
            at_stage = seconds if engine_seconds is None else engine_seconds
            self.costs.step(decode_tokens, at_stage)
            self.service_seconds = _moved_estimate(self.service_seconds, seconds)
            self.network_seconds = _moved_estimate(self.network_seconds, max(0.0, seconds - at_stage))

    def prompt_pass(self, tokens: int, seconds: float) -> None:
        """Adds a forward pass that computed a prompt chunk. `tokens` are those of all events in the pass."""
        if tokens >= _FEWEST_PROMPT_TOKENS:
            weight = _PROMPT_WEIGHT if self.prompt_token_seconds else 1.0
            self.prompt_token_seconds += weight * (seconds / tokens - self.prompt_token_seconds)


def _moved_estimate(estimate: float, seconds: float) -> float:
    weight = 1.0 if not estimate else _QUICKER_WEIGHT if seconds < estimate else _SLOWER_WEIGHT
    return estimate + weight * (seconds - estimate)


@dataclass(slots=True)
class Stats:
    """Counters of the scheduler since its start.

    The fields from `waiting` to `trips` are not counters but current numbers. `Scheduler.stats` sets them and `wake_ups` in the
    copy that it returns.
    """

    stages: list[StageStats]
    waiting: int = 0
    memory_backlog: int = 0  # those of `waiting` that a stage refused for lack of memory
    running: int = 0
    micro_batches: int = 0
    trips: int = 0
    steps_seconds: float = 0.0  # all seconds of the threads that walk trips
    deciding_seconds: float = 0.0  # part of `steps_seconds`: with the lock, or waiting for it
    tokens: int = 0  # drawn by the last stage
    prompt_tokens: int = 0  # sent to the first stage, replays included
    cached_tokens: int = 0  # prompt tokens that every stage held when the first chunk was sent
    draft_tokens_accepted: int = 0
    draft_tokens_rejected: int = 0
    sequences: Counter[str] = field(default_factory=Counter)  # ended, by finish reason or problem name
    replays: Counter[str] = field(default_factory=Counter)  # sequences whose KV was computed again, by cause
    grown: int = 0  # times that an open-ended answer filled its memory and asked for more
    migrations: Counter[str] = field(default_factory=Counter)  # micro-batches, by cause: leaving or balance
    wake_ups: int = 0  # rounds of warm-up events

    def step_over(self, began: float, walked: float) -> float:
        """Counts the time of one step of a thread that walks trips, and returns the current time.

        The step began at `began`, its trip was over at `walked`, and the thread's next step begins now. All times are in
        time.perf_counter().
        """
        now = time.perf_counter()
        self.deciding_seconds += now - walked
        self.steps_seconds += now - began
        return now

    def seconds_by_part(self) -> dict[str, float]:
        """Splits `steps_seconds` into the parts `exchange`, `events`, `deciding` and `rows`.

        `exchange` is the time of requests and replies on the wire. `events` is the rest of the time between sending an event
        and its reply. `deciding` is the time with the lock or waiting for the lock. `rows` is all other time, mostly making
        Batches and applying replies.
        """
        hops = sum(stage.seconds for stage in self.stages)
        exchange = sum(stage.exchange_seconds for stage in self.stages)
        rows = max(0.0, self.steps_seconds - hops - self.deciding_seconds)
        return {"exchange": exchange, "events": hops - exchange, "deciding": self.deciding_seconds, "rows": rows}
