"""Replays traces recorded from Knative's own autoscaler through `kpa.Autoscaler`, and reports decisions that differ.

A trace is a line of JSON: `spec`, `metric_aggregation_algorithm`, `initial_ready` and `steps`. A step has the second `t`, the
revision's concurrency `record` if data came, and, if a decision was due, the `ready` pods and Knative's answer: `stable`,
`panic`, `desired`, `excess_burst_capacity`, `panicking`; `valid` is false if Knative had no data.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from knative.local.autoscaler.kpa import Autoscaler, DeciderSpec, Decision

_GZIP_MAGIC: Final = b"\x1f\x8b"
_TOLERANCE: Final = 1e-9
# Knative stamps the panic that an autoscaler starts in with the wall clock, whatever clock its decisions are given. In a
# recorded trace that time never comes: such a panic ends only after the threshold was exceeded again.
_RECORDER_CLOCK: Final = math.inf


class TraceError(Exception):
    """A trace file cannot be read. The message names file and line."""


class Difference(msgspec.Struct, frozen=True):
    """A decision that differs from the one that Knative made at second `t` of a trace."""

    trace: str
    t: float
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.trace} at {self.t:g} s: Knative {self.expected}, here {self.got}"


class Replay(msgspec.Struct, frozen=True):
    decisions: int  # how many were compared
    differences: tuple[Difference, ...]


class _Step(msgspec.Struct, frozen=True):
    t: float
    record: float | None = None
    ready: int | None = None  # present if a decision was due
    valid: bool = True
    stable: float = 0.0
    panic: float = 0.0
    desired: int = 0
    excess_burst_capacity: int = 0
    panicking: bool = False


class _Trace(msgspec.Struct, frozen=True):
    name: str
    spec: DeciderSpec
    steps: list[_Step]
    metric_aggregation_algorithm: str = "linear"
    initial_ready: int = 0


def replay(path: Path | str) -> Replay:
    """Runs the traces in a file through `Autoscaler` and compares each decision with the one that Knative made.

    Scale, burst capacity and panic must be equal, averages within 1e-9. path: JSON lines, or gzip. Raises TraceError, OSError.
    """
    decisions = 0
    differences: list[Difference] = []
    for trace in _traces(Path(path)):
        for difference in _compare(trace):
            decisions += 1
            if difference is not None:
                differences.append(difference)
    return Replay(decisions, tuple(differences))


def _traces(path: Path) -> Iterator[_Trace]:
    data = path.read_bytes()
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise TraceError(f"{path}: not a complete gzip file: {error}") from error
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=_Trace)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}:{number}: not a trace: {error}") from error


def _compare(trace: _Trace) -> Iterator[Difference | None]:
    """Yields one item for each decision of the trace: how it differs from Knative's, or None if it does not."""
    autoscaler = Autoscaler(trace.spec, trace.metric_aggregation_algorithm, ready=trace.initial_ready, now=_RECORDER_CLOCK)
    for step in trace.steps:
        if step.record is not None:
            autoscaler.record(step.t, step.record)
        if step.ready is None:
            continue
        got, expected = autoscaler.decide(step.t, step.ready), None
        if step.valid:
            expected = Decision(step.desired, step.excess_burst_capacity, step.stable, step.panic, step.panicking)
        same = _same(expected, got) and step.panicking == (autoscaler.state.panic_since is not None)
        yield None if same else Difference(trace.name, step.t, _words(expected), _words(got))


def _same(expected: Decision | None, got: Decision | None) -> bool:
    if expected is None or got is None:
        return expected is got
    return (
        expected.desired_scale == got.desired_scale
        and expected.excess_burst_capacity == got.excess_burst_capacity
        and expected.panicking == got.panicking
        and math.isclose(expected.stable, got.stable, rel_tol=0, abs_tol=_TOLERANCE)
        and math.isclose(expected.panic, got.panic, rel_tol=0, abs_tol=_TOLERANCE)
    )


def _words(decision: Decision | None) -> str:
    if decision is None:
        return "no data"
    return (
        f"desired {decision.desired_scale} (stable {decision.stable:.9g}, panic {decision.panic:.9g}, "
        f"excess burst capacity {decision.excess_burst_capacity}{', panicking' if decision.panicking else ''})"
    )
