"""Where to cut a model: N groups of consecutive layers, none heavier than it must be.

A group's weight is the larger of its share of all bytes (what it loads and holds) and its share of all compute (what it
does for a token). Embedding and head belong to the first and last group, and are heavy in small models. The cut is exact:
no other cut has a lighter heaviest group, and among those that tie the most even one is taken.
"""

import math
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Final

from eventing.wire.events import Cut
from knative.spec.errors import SpecError, TooManyStages
from knative.spec.model_shape import ModelShape

_TOLERANCE: Final = 1e-12


def cut_evenly(shape: ModelShape, stages: int) -> Cut:
    """Layer groups [first, last). Raises TooManyStages, or ValueError for fewer than one."""
    layers = shape.num_layers
    if stages < 1:
        raise ValueError(f"{stages} stages wanted; a pipeline has at least one")
    if stages > layers:
        raise TooManyStages(f"{stages} stages wanted, but {shape.name} has {layers} layers; ask for at most {layers} stages")
    weight = _group_weight(shape)
    heaviest = _partition(layers, stages, weight, max)[0]

    def evenness(first: int, last: int) -> float:
        group = weight(first, last)
        return group * group if group <= heaviest + _TOLERANCE else math.inf

    bounds = _partition(layers, stages, evenness, lambda a, b: a + b)[1]
    return tuple(pairwise(bounds))


def parse_cut(text: str, path: str = "cut") -> Cut:
    """`0:10,10:20` → ((0, 10), (10, 20)). Raises SpecError where groups are empty, overlap or leave a gap."""
    match = re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text)
    if match is None:
        raise SpecError(f"{path}: {text!r} is no cut such as 0:10,10:20,20:30")
    groups = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    cut = tuple((first, last) for first, last in groups)
    expected = 0
    for first, last in cut:
        if first != expected or last <= first:
            raise SpecError(
                f"{path}: {text!r}: group {first}:{last} must begin with layer {expected} and hold at least one layer"
            )
        expected = last
    return cut


def format_cut(cut: Cut) -> str:
    return ",".join(f"{first}:{last}" for first, last in cut)


def _group_weight(shape: ModelShape) -> Callable[[int, int], float]:
    size = list(accumulate(shape.layer_bytes, initial=0))
    work = list(accumulate(shape.layer_compute, initial=0))
    total_size = size[-1] + shape.embedding_bytes + shape.head_bytes
    total_work = work[-1] + shape.head_compute

    def weight(first: int, last: int) -> float:
        is_last = last == shape.num_layers
        group_size = size[last] - size[first]
        group_size += shape.embedding_bytes if first == 0 else 0
        group_size += shape.head_bytes if is_last else 0
        group_work = work[last] - work[first] + (shape.head_compute if is_last else 0)
        return max(group_size / total_size, group_work / total_work)

    return weight


def _partition(
    layers: int, stages: int, weight: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The cheapest way to split `layers` into `stages`, by dynamic programming: its cost, and the bounds 0 … layers."""
    best: list[tuple[float, tuple[int, ...]]] = [
        (weight(0, last), (0, last)) if last else (math.inf, ()) for last in range(layers + 1)
    ]
    for stage in range(2, stages + 1):
        best = [_cheapest(best, last, stage, weight, join) for last in range(layers + 1)]
    return best[layers]


def _cheapest(
    best: list[tuple[float, tuple[int, ...]]],
    last: int,
    stage: int,
    weight: Callable[[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    if last < stage:
        return math.inf, ()
    return min((join(best[first][0], weight(first, last)), (*best[first][1], last)) for first in range(stage - 1, last))
