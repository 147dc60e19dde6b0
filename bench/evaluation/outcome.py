"""The outcome of a run, emulated or simulated: latencies, objective, cost."""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from bench.evaluation.trace import Floats, Trace

PATIENCE_SECONDS: Final = 120.0  # an answer that takes longer has failed: clients give up
# The objective: upper bounds for one request.
MOST_FIRST_TOKEN_SECONDS: Final = 2.0
MOST_TOKEN_SECONDS: Final = 0.2  # mean, after the first


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    replica_seconds: float
    byte_seconds: float  # of weights in devices' memory
    cold_starts: int
    network_bytes: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    requests: int
    failed: int
    seconds: float  # from the beginning to the last answer, at least the load's length
    tokens_per_second: float
    first_token_seconds: tuple[float, float, float]  # p50, p95, p99
    token_seconds: tuple[float, float, float]
    attainment: float  # share of all requests that were answered within the objective
    cost: Cost
    pauses: tuple[float, float] | None = None  # between two tokens of an answer: p99.9, longest; None: not recorded


def outcome_of(
    trace: Trace,
    first: Floats,
    last: Floats,
    seconds: float,
    cost: Cost,
    pauses: Sequence[float] = (),
    slowness: float = 1.0,
) -> Outcome:
    """first, last: times of each request's first and last token on the trace's clock; NaN: never. slowness: of the devices,
    with which the objective is multiplied.
    """
    first_token = first - trace.arrival_seconds
    per_token = (last - first) / np.maximum(1, trace.answer_tokens - 1)
    answered = np.isfinite(last) & (last - trace.arrival_seconds <= PATIENCE_SECONDS)
    in_time = (first_token <= slowness * MOST_FIRST_TOKEN_SECONDS) & (per_token <= slowness * MOST_TOKEN_SECONDS)
    met = answered & in_time
    several = answered & (trace.answer_tokens > 1)
    return Outcome(
        requests=len(trace),
        failed=int((~answered).sum()),
        seconds=seconds,
        tokens_per_second=float(trace.answer_tokens[answered].sum() / seconds),
        first_token_seconds=_quantiles(first_token[answered]),
        token_seconds=_quantiles(per_token[several]),
        attainment=float(met.mean()),
        cost=cost,
        pauses=(float(np.quantile(pauses, 0.999)), max(pauses)) if pauses else None,
    )


def _quantiles(values: Floats) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99))
    return float(p50), float(p95), float(p99)
