"""Averages over a window of one-second buckets, as Knative's autoscaler keeps them (pkg/autoscaler/aggregation).

A window holds the sum of what was recorded in each second. `LinearWindow` averages it evenly, `ExponentialWindow` weighs
the newest second most. Times are seconds, of any clock that only grows; values are whatever is averaged, such as requests.
"""

import math
from collections.abc import Callable
from typing import Final, Protocol

_DIGITS: Final = 10**6
"""Knative rounds linear averages to six decimals, so that adding and taking away floats leaves no dust."""
_WEIGHT_SUM: Final = 0.9999
"""The exponential weights of a window add up to at least this."""
_LEAST_SMOOTHING: Final = 0.2
"""Below this decay a long window would hardly differ from the linear average."""


class MetricWindow(Protocol):
    """What the autoscaler asks of either average."""

    def record(self, now: float, value: float) -> None:
        """Adds `value` to the bucket of the second `now`; one that is a window older than the newest is dropped."""

    def average(self, now: float) -> float:
        """The average of the window that ends now; 0 where nothing was recorded in it."""

    def is_empty(self, now: float) -> bool:
        """True where nothing was recorded for longer than the window."""


class _Buckets:
    """A ring of one-second sums with what both averages need: the first and last second written, and the total."""

    def __init__(self, window_seconds: float) -> None:
        self.size = math.ceil(window_seconds)
        self._ring = [0.0] * self.size
        self._total = 0.0
        self._first: int | None = None
        self._last: int | None = None

    def record(self, now: float, value: float) -> None:
        second = math.floor(now)
        if self._last is None:
            self._first = self._last = second
        elif second != self._last and not self._make_room(second, self._last):
            return
        self._ring[second % self.size] += value
        self._total += value

    def is_empty(self, now: float) -> bool:
        return self._last is None or math.floor(now) - self._last > self.size

    def _make_room(self, second: int, last: int) -> bool:
        """Moves the window on to `second`; False where it lies a window in the past."""
        if second + self.size <= last:
            return False
        if self._first is None or second < self._first:
            self._first = second
        if second - last >= self.size:
            self._ring = [0.0] * self.size
            self._total = 0.0
            self._first = second
        else:
            for index in range(last + 1, second + 1):
                self._total -= self._ring[index % self.size]
                self._ring[index % self.size] = 0.0
        self._last = max(last, second)
        return True


class LinearWindow(_Buckets):
    """Every second of the window counts alike.

    Until the window has filled, and where the newest seconds are missing, the average is over the seconds that there are.
    Seconds missing in between count as zero.
    """

    def average(self, now: float) -> float:
        if self._last is None or self._first is None:
            return 0.0
        missing = max(0, math.floor(now) - self._last)
        if missing >= self.size:
            return 0.0
        total = self._total
        for index in range(self._last + 1, self._last + missing + 1):
            total -= self._ring[index % self.size]
        seconds = min(self._last - self._first + 1, self.size - missing)
        return _rounded(total / seconds)


class ExponentialWindow(_Buckets):
    """Each second counts for a fixed share less than the one behind it; seconds that are missing count as zero."""

    def __init__(self, window_seconds: float) -> None:
        super().__init__(window_seconds)
        self.smoothing = max(1 - (1 - _WEIGHT_SUM) ** (1 / self.size), _LEAST_SMOOTHING)

    def average(self, now: float) -> float:
        if self._last is None or self.is_empty(now):
            return 0.0
        missing = max(0, math.floor(now) - self._last)
        weight = self.smoothing
        if missing:
            weight *= (1 - self.smoothing) ** missing
        total = 0.0
        for age in range(self.size - missing):
            total += self._ring[(self._last - age) % self.size] * weight
            weight *= 1 - self.smoothing
        return total


WINDOWS: Final[dict[str, Callable[[float], MetricWindow]]] = {
    "linear": LinearWindow,
    "weighted-exponential": ExponentialWindow,
    "weightedExponential": ExponentialWindow,
}
"""By the value of `autoscaling.knative.dev/metric-aggregation-algorithm`; any other value means linear to Knative."""


def _rounded(value: float) -> float:
    """To six decimals, halves away from zero as Go rounds (Python rounds them to even)."""
    scaled = value * _DIGITS
    whole = math.trunc(scaled)
    if abs(scaled - whole) >= 0.5:
        whole += int(math.copysign(1, scaled))
    return whole / _DIGITS
