"""What a step takes by the number of its tokens, measured: four tokens often cost hardly more than one, sixteen do."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Steps with more tokens than one of these, up to the next, are taken to be alike."""
_FALL: Final = 0.3
_RISE: Final = 0.02
"""Shares of a quicker and of a slower step in what a step is taken to last: waits make steps slow, nothing makes them quick."""
_ASSUMED_SHARE: Final = 0.02
"""Of a step, that a further token is taken to cost where nothing has been measured: it is tried, and then known."""
_KEPT_STEPS: Final = 2_000
"""What was measured so long ago is tried again."""


@dataclass(slots=True)
class _Measured:
    tokens: float
    seconds: float
    at_step: int


@dataclass(slots=True)
class RowCosts:
    """Of one stage, as the gateway sees it."""

    _measured: dict[int, _Measured] = field(default_factory=dict)
    """By an index of _SIZES."""
    _steps: int = 0

    def step(self, tokens: int, seconds: float) -> None:
        """A decode step of so many tokens was answered after `seconds`."""
        self._steps += 1
        size = bisect_left(_SIZES, tokens)
        old = self._measured.get(size)
        if old is None or self._steps - old.at_step > _KEPT_STEPS:
            self._measured[size] = _Measured(tokens, seconds, self._steps)
            return
        share = _FALL if seconds < old.seconds else _RISE
        old.seconds += share * (seconds - old.seconds)
        old.tokens += share * (tokens - old.tokens)
        old.at_step = self._steps

    def seconds(self, tokens: int) -> float | None:
        """What a step of so many takes; None before the first step. Never more than a larger one takes."""
        return seconds_on(self.points(), tokens)

    def points(self) -> list[tuple[float, float]]:
        """Tokens and seconds that were measured, ascending: for who asks about many numbers of tokens at once.

        A step that took longer than a larger one has waited: were the larger one taken to last as long, one slow step of a
        rare size would make all further tokens look free.
        """
        points: list[tuple[float, float]] = []
        for size in sorted(self._measured, reverse=True):
            one = self._measured[size]
            if self._steps - one.at_step <= _KEPT_STEPS and (not points or one.tokens < points[-1][0]):
                points.append((one.tokens, min(one.seconds, points[-1][1] if points else math.inf)))
        return points[::-1]


def seconds_on(points: Sequence[tuple[float, float]], tokens: int) -> float | None:
    """As `RowCosts.seconds`, between measured points a straight line."""
    if not points:
        return None
    if tokens <= points[0][0]:
        return points[0][1] / (1 + _ASSUMED_SHARE * (points[0][0] - tokens))
    for (few, less), (many, more) in pairwise(points):
        if tokens <= many:
            return less + (more - less) * (tokens - few) / (many - few)
    last, seconds = points[-1]
    return seconds * (1 + _ASSUMED_SHARE * (tokens - last))
