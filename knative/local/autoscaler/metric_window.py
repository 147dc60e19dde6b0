"""Averages over a window of one-second buckets, as Knative's autoscaler keeps them (pkg/autoscaler/aggregation).

A bucket holds the sum of the values recorded in its second. `LinearWindow` averages all seconds evenly, `ExponentialWindow`
weighs the newest most. Times are in seconds of any clock that only grows.
"""

import math
from typing import Final

_DIGITS: Final = 10**6  # Knative rounds linear averages to six decimals, which hides the error of adding and subtracting
_WEIGHT_SUM: Final = 0.9999  # the exponential weights of a window add up to at least this
_LEAST_SMOOTHING: Final = 0.2  # with a smaller decay a long window would hardly differ from the linear average


class MetricWindow:
    """The sums of the last `window_seconds` seconds, in a ring of one bucket a second.

    Subclasses add `average(now)`: the average over the window that ends at `now`, 0 if nothing was recorded in it.
    """

    def __init__(self, window_seconds: float) -> None:
        self.size = math.ceil(window_seconds)
        self._ring = [0.0] * self.size
        self._total = 0.0
        self._first: int | None = None
        self._last: int | None = None

    def record(self, now: float, value: float) -> None:
        """Adds `value` to the bucket of the second `now`. Values older than the newest by a whole window are dropped."""
        second = math.floor(now)
        if self._last is None:
            self._first = self._last = second
        elif second != self._last and not self._advance(second, self._last):
            return
        self._ring[second % self.size] += value
        self._total += value

    def is_empty(self, now: float) -> bool:
        """True if nothing was recorded for longer than the window."""
        return self._last is None or math.floor(now) - self._last > self.size

    def _advance(self, second: int, last: int) -> bool:
        """Extends the window to `second` and clears skipped buckets. Returns False if `second` is too old for the window."""
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


class LinearWindow(MetricWindow):
    """Every second of the window weighs the same.

    The average is over the seconds from the first to the last record within the window. Missing ones count as zero.
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


class ExponentialWindow(MetricWindow):
    """Each second weighs a fixed fraction less than the second after it; seconds without a value count as zero."""

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


# By the value of `autoscaling.knative.dev/metric-aggregation-algorithm`; any other value means linear to Knative.
WINDOWS: Final[dict[str, type[LinearWindow] | type[ExponentialWindow]]] = {
    "linear": LinearWindow,
    "weighted-exponential": ExponentialWindow,
    "weightedExponential": ExponentialWindow,
}


def _rounded(value: float) -> float:
    """Rounds to six decimals, halves away from zero as Go does (Python rounds them to even)."""
    scaled = value * _DIGITS
    whole = math.trunc(scaled)
    if abs(scaled - whole) >= 0.5:
        whole += int(math.copysign(1, scaled))
    return whole / _DIGITS
