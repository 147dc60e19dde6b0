"""Cuts a model into groups of consecutive layers so that the heaviest group is as light as possible.

A group's weight is the larger of two shares: of all bytes (to load and hold) and of all compute (per token). The embedding
belongs to the first group and the head to the last; both are heavy in small models. The cut is optimal: no other cut has a
lighter heaviest group, and among equal ones the most even cut is chosen.
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
    """The best cut of a model into this number of stages, as layer groups [first, last).

    Raises TooManyStages, or ValueError for fewer than one stage.
    """
    layers = shape.num_layers
    if stages < 1:
        raise ValueError(f"{stages} stages requested; a pipeline has at least one")
    most = layers - len(shape.joined)
    if stages > most:
        why = f", of which some must be in one stage: {next(iter(shape.joined.values()))}" if shape.joined else ""
        raise TooManyStages(
            f"{stages} stages requested, but {shape.name} has {layers} layers{why}; ask for at most {most} stages"
        )
    weight = _group_weight(shape)
    heaviest = _partition(layers, stages, weight, max)[0]

    def evenness(first: int, last: int) -> float:
        group = weight(first, last)
        return group * group if group <= heaviest + _TOLERANCE else math.inf

    bounds = _partition(layers, stages, evenness, lambda a, b: a + b)[1]
    return tuple(pairwise(bounds))


def parse_cut(text: str, path: str = "cut") -> Cut:
    """The cut that a text describes: `0:10,10:20` → ((0, 10), (10, 20)). path: the text's field in the spec, for the message.

    Raises SpecError if a group is empty, or if groups overlap or leave a gap.
    """
    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text) is None:
        raise SpecError(f"{path}: {text!r} is not a cut such as 0:10,10:20,20:30")
    expected = 0
    cut: list[tuple[int, int]] = []
    for part in text.split(","):
        first, last = map(int, part.split(":"))
        if first != expected or last <= first:
            raise SpecError(
                f"{path}: {text!r}: group {first}:{last} must begin with layer {expected} and hold at least one layer"
            )
        cut.append((first, last))
        expected = last
    return tuple(cut)


def format_cut(cut: Cut) -> str:
    return ",".join(f"{first}:{last}" for first, last in cut)


def _group_weight(shape: ModelShape) -> Callable[[int, int], float]:
    size = list(accumulate(shape.layer_bytes, initial=0))
    work = list(accumulate(shape.layer_compute, initial=0))
    total_size = size[-1] + shape.embedding_bytes + shape.head_bytes
    total_work = work[-1] + shape.head_compute

    def weight(first: int, last: int) -> float:
        if first in shape.joined:
            return math.inf
        group_size = size[last] - size[first] + shape.outer_bytes(first, last)
        group_work = work[last] - work[first] + (shape.head_compute if last == shape.num_layers else 0)
        return max(group_size / total_size, group_work / total_work)

    return weight


def _partition(
    layers: int, stages: int, weight: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Splits `layers` layers into `stages` groups at the lowest cost, by dynamic programming.

    weight: cost of the group [first, last). join: makes one cost of two, such as their maximum. Returns the whole cost, and the
    bounds of the groups, from 0 to `layers`.
    """
    impossible: tuple[float, tuple[int, ...]] = (math.inf, ())
    best = [(weight(0, last), (0, last)) if last else impossible for last in range(layers + 1)]
    for stage in range(2, stages + 1):
        best = [
            min((join(best[first][0], weight(first, last)), (*best[first][1], last)) for first in range(stage - 1, last))
            if last >= stage
            else impossible
            for last in range(layers + 1)
        ]
    return best[layers]
