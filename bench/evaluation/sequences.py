"""All requests of a simulation as places on curves over time: admitted, prompt tokens computed, tokens per sequence."""

from typing import Any, Final

import numpy as np

from bench.evaluation.outcome import PATIENCE_SECONDS
from bench.evaluation.rounds import Flow
from bench.evaluation.trace import Floats, Integers, Trace
from functions.gateway.scheduling.batching import SchedulerLimits

_ALMOST: Final = 1e-3  # tokens


class Sequences:
    """All requests. They are admitted, and their prompts computed, in the order of arrival; clients give up after a time."""

    def __init__(self, trace: Trace) -> None:
        count = len(trace)
        self._trace = trace
        self._queue: Integers = np.zeros(0, np.int64)
        # Requests' indexes in the order of admission, which the other arrays share.
        self._admissions: Integers = np.zeros(count, np.int64)
        self._prompts: Floats = np.zeros(count + 1)  # tokens of all earlier prompts
        most = int(trace.answer_tokens.max(initial=1)) + 2
        # Rings, by the tokens that a sequence which decodes throughout has got: how many end then, and what they free.
        self._ends = np.zeros(most, np.int64)
        self._ends_reserved = np.zeros(most, np.float64)
        self._arrived = self._admitted = self._prompted = self._ended = 0
        self._computed = 0.0  # prompt tokens
        self._replay = self.replayed_tokens = 0.0
        self._tokens = 0.0  # of a sequence that decodes throughout
        self._reserved = 0.0
        self.held_tokens = 0.0
        self._admitted_at = np.zeros(count)
        self._at: list[float] = [0.0]
        self._computed_curve: list[float] = [0.0]
        self._tokens_curve: list[float] = [0.0]
        self._flows: list[tuple[float, float]] = [(0.0, 1.0)]  # (seconds of the fill, tokens a second of a prompt alone)
        self._last_round = (0.0, 1.0)  # the last time with decoding sequences, and the seconds of a round then

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return self._admitted - self._ended

    @property
    def decoding(self) -> int:
        return self._prompted - self._ended

    @property
    def prompt_backlog(self) -> float:
        return float(self._prompts[self._admitted]) - self._computed + min(self._replay, SchedulerLimits().chunk_tokens)

    def arrive(self, now: float, max_waiting: int) -> None:
        arrivals = self._trace.arrival_seconds
        come = int(np.searchsorted(arrivals, now, "right"))
        gone = int(np.searchsorted(arrivals[self._queue], now - PATIENCE_SECONDS))
        new = np.arange(self._arrived, come)
        self._queue = np.concatenate([self._queue[gone:], new])[:max_waiting]
        self._arrived = come

    def admit(self, most: int, capacity_tokens: float) -> None:
        """Admits up to `most` waiting requests, as of the last mark."""
        first = self._queue[: max(0, most)]
        reserves = np.cumsum(self._trace.prompt_tokens[first] + self._trace.answer_tokens[first])
        count = int(np.searchsorted(reserves, capacity_tokens - self._reserved, "right"))
        if not count:
            return
        chosen, until = first[:count], self._admitted + count
        self._queue = self._queue[count:]
        self._admissions[self._admitted : until] = chosen
        self._admitted_at[self._admitted : until] = np.maximum(self._trace.arrival_seconds[chosen], self._at[-1])
        before = self._prompts[self._admitted]
        self._prompts[self._admitted + 1 : until + 1] = before + np.cumsum(self._trace.prompt_tokens[chosen])
        self._reserved += float(reserves[count - 1])
        self._admitted = until

    def replay(self, tokens: float) -> None:
        """Adds tokens to compute again after migrations, at most those that are held."""
        self._replay = min(self._replay + tokens, self.held_tokens)

    def stand_still(self, now: float) -> None:
        self._mark(now, self._flows[-1])

    def go_on(self, now: float, seconds: float, pace: Flow, micro_batches: int) -> None:
        """Advances all requests. A migrating micro-batch, one at a time, gets no token until it is computed again."""
        if pace.round_seconds:
            moving = min(self._replay / max(1.0, self.held_tokens), 1 / micro_batches)
            self._answer((1 - moving) * seconds / pace.round_seconds)
        computed = pace.prompt_tokens_per_second * seconds
        # A migrating one (`functions/gateway/scheduling/decide.py`) passes one pod of every stage.
        again = min(self._replay, computed, pace.prompt_tokens_per_second_alone * seconds)
        self._replay -= again
        self.replayed_tokens += again
        self._computed = min(self._computed + computed - again, float(self._prompts[self._admitted]))
        done = int(np.searchsorted(self._prompts[: self._admitted + 1], self._computed + 1e-6, "right")) - 1
        if done > self._prompted:
            self._begin(done)
        alone = pace.prompt_tokens_per_second_alone
        if pace.round_seconds:
            self._last_round = (now, pace.round_seconds)
        self._mark(now, (pace.fill_seconds, alone) if alone else self._flows[-1])

    def _begin(self, until: int) -> None:
        """Prompts up to `until` are computed: their sequences have a first token and decode on."""
        chosen = self._admissions[self._prompted : until]
        places = (int(self._tokens) + self._trace.answer_tokens[chosen]) % len(self._ends)
        reserves = self._trace.prompt_tokens[chosen] + self._trace.answer_tokens[chosen]
        self._ends += np.bincount(places, minlength=len(self._ends))
        self._ends_reserved += np.bincount(places, reserves, len(self._ends))
        self.held_tokens += float(self._prompts[until] - self._prompts[self._prompted])
        self._prompted = until

    def _answer(self, tokens: float) -> None:
        """Gives each decoding sequence this many tokens more."""
        before, self._tokens = int(self._tokens), self._tokens + tokens
        self.held_tokens += self.decoding * tokens
        for place in range(before + 1, int(self._tokens) + 1):
            index = place % len(self._ends)
            if ended := int(self._ends[index]):
                freed = float(self._ends_reserved[index])
                self._ended += ended
                self._reserved -= freed
                self.held_tokens = max(0.0, self.held_tokens - freed)
                self._ends[index], self._ends_reserved[index] = 0, 0.0

    def _mark(self, now: float, pace: tuple[float, float]) -> None:
        self._at.append(now)
        self._computed_curve.append(self._computed)
        self._tokens_curve.append(self._tokens)
        self._flows.append(pace)

    def times(self) -> tuple[Floats, Floats]:
        """Times of each request's first and last token; NaN: not yet, or never."""
        at, computed, tokens = map(np.array, (self._at, self._computed_curve, self._tokens_curve))
        fill, alone = np.array(self._flows).T
        chosen = self._admissions[: self._prompted]
        answers = self._trace.answer_tokens[chosen]
        rising, growing = _rising(computed), _rising(tokens)
        ends = self._prompts[: self._prompted + 1]
        begun = np.maximum(np.interp(ends[:-1], computed[rising], at[rising]), self._admitted_at[: self._prompted])
        # If no prompt follows at once, the end is on a level part of the curve, whose other side comes with the next prompt.
        done = np.interp(ends[1:] - _ALMOST, computed[rising], at[rising])
        # A mark describes the step that ends with it.
        step = np.minimum(np.searchsorted(at, begun, "right"), len(at) - 1)
        first = np.maximum(begun + self._trace.prompt_tokens[chosen] / alone[step] + fill[step], done)
        wanted = np.interp(first, at, tokens) + answers - 1
        # Sequences that began within a step count from its end and so ended too early: their last tokens follow the last pace.
        when, seconds = self._last_round
        beyond = when + (wanted - tokens[-1]) * seconds
        last = np.where(wanted > tokens[-1], beyond, np.interp(wanted, tokens[growing], at[growing]))
        last = np.where(answers == 1, first, last)
        firsts, lasts = np.full(len(self._trace), np.nan), np.full(len(self._trace), np.nan)
        firsts[chosen], lasts[chosen] = first, last
        firsts[firsts > at[-1]] = np.nan
        lasts[np.isnan(firsts) | (lasts > at[-1])] = np.nan
        return firsts, lasts


def _rising(curve: Floats) -> Any:
    """Indexes at which a monotonic curve rises or has just risen: its level parts have no inverse."""
    kept = np.ones(len(curve), bool)
    kept[1:] = np.diff(curve) > 0
    kept[:-1] |= np.diff(curve) > 0
    return np.flatnonzero(kept)
