"""The loads of the experiment: a ramp, bursts, a day and night in short, and a trace."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from bench.evaluation.trace import Floats, Sizes, Trace, drawn

LOADS: Final = ("ramp", "bursts", "day", "trace")
STEP_SECONDS: Final = 1.0
_NIGHT_SHARE: Final = 0.02


def rates(load: str, seconds: int, peak: float) -> Floats:
    """Requests a second, for every second of a load of that length."""
    at = np.arange(seconds) / seconds
    if load == "ramp":
        return peak * np.minimum(1.0, at / 0.8)
    if load == "bursts":
        return np.where((at * 4) % 1 < 0.4, peak, 0.1 * peak)
    if load == "day":
        return peak * np.maximum(_NIGHT_SHARE, np.sin(np.pi * np.clip((at - 0.2) / 0.6, 0, 1)))
    if load == "trace":
        return np.full(seconds, 0.6 * peak)
    raise ValueError(f"load {load!r}: there is {', '.join(LOADS)}")


def make_loads(seconds: int, peak: float, seed: int, trace: Trace | None, sizes: Sizes | None = None) -> Mapping[str, Trace]:
    """peak: requests a second. trace: what the load of that name is a part of, at 0.6 × peak; None: drawn."""
    drawn_sizes = sizes or Sizes()
    found = {load: drawn(load, rates(load, seconds, peak), STEP_SECONDS, seed, drawn_sizes) for load in LOADS}
    if trace is not None:
        begin = (trace.seconds / 2 + seed * seconds) % max(1.0, trace.seconds - seconds)
        wanted = 0.6 * peak / (len(trace) / trace.seconds)
        found["trace"] = _renamed(trace.times(wanted, seed).part(begin, begin + seconds))
    return found


def _renamed(trace: Trace) -> Trace:
    return Trace("trace", trace.arrival_seconds, trace.prompt_tokens, trace.answer_tokens)
