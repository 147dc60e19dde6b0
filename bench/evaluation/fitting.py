"""Fits a profile to measured points, by least squares of relative errors with coefficients of at least 0."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from bench.evaluation.profile import Profile, ProfileInvalid
from functions.configuration.pass_times import pairs

_Floats = npt.NDArray[np.float64]
_DIMENSIONS: Final = ("layers", "rows", "position")


@dataclass(frozen=True, slots=True)
class Point:
    """The measured time of one kind of pass."""

    layers: int
    rows: int
    length: int  # new tokens of each row: 1 of a step
    position: int  # tokens that each row held before
    seconds: float


def fit_profile(points: Sequence[Point], heads: Iterable[tuple[int, float]], model: str, source: str) -> Profile:
    """heads: (rows, seconds). Raises ProfileInvalid, which names the missing points, if they do not determine the profile."""
    steps = [point for point in points if point.length == 1]
    chunks = [point for point in points if point.length > 1]
    _check(steps, "steps", _DIMENSIONS)
    _check(chunks, "prompt chunks", ("layers", "length"))
    streamed = _fit(
        [[1, p.layers, p.layers * p.rows, p.layers * p.rows * (p.position + 1)] for p in steps], [p.seconds for p in steps]
    )
    fixed = streamed[0]
    computed = _fit(
        [[p.layers * p.length, p.layers * pairs(p.position, p.length)] for p in chunks], [p.seconds - fixed for p in chunks]
    )
    found = sorted(heads)
    if len({rows for rows, _ in found}) < 2:
        raise ProfileInvalid(f"heads of {len(found)} points: at least two numbers of rows say what a row costs")
    profile = Profile(
        model=model,
        source=source,
        pass_seconds=fixed,
        layer_seconds=0.0,
        layer_token_seconds=computed[0],
        layer_pair_seconds=computed[1],
        layer_stream_seconds=streamed[1],
        layer_stream_token_seconds=streamed[2],
        layer_kv_token_seconds=streamed[3],
        head_row_seconds=found[-1][1] / found[-1][0],
        head_stream_seconds=found[0][1],
    )
    errors = [abs(_fitted(profile, point) / point.seconds - 1) for point in points]
    return msgspec.structs.replace(profile, worst_error=round(max(errors), 3))


def _fitted(profile: Profile, point: Point) -> float:
    times = profile.of_stage(1, 1 + point.layers, 2 + point.layers)
    tokens = point.rows * point.length
    return times.forward_seconds(
        tokens, point.rows * pairs(point.position, point.length), point.rows * (point.position + point.length)
    )


def _check(points: Sequence[Point], what: str, dimensions: Iterable[str]) -> None:
    for name in dimensions:
        seen = {getattr(point, name) for point in points}
        if len(seen) < 2:
            at = f"with {name} {seen.pop()} alone" if seen else "nowhere"
            raise ProfileInvalid(f"{what} were measured {at}: add points of another {name}")


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of at least 0: negative ones are left out and the others fitted again."""
    target = np.array(seconds)
    matrix: _Floats = np.array(rows, np.float64) / target[:, None]
    wanted: npt.NDArray[Any] = np.ones(len(target))
    kept = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
        if (solution >= 0).all():
            result = [0.0] * matrix.shape[1]
            for index, value in zip(kept, solution, strict=True):
                result[index] = float(value)
            return result
        kept = [index for index, value in zip(kept, solution, strict=True) if value >= 0]
