"""The objective for answers, and the settings that follow from it if a spec does not set them."""

import math
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from functions.configuration.objective import Objective
from knative.spec.errors import SpecError

_TAIL: Final = 1.5  # a slow token of `share` takes so many times as long as a mean one
# Events at a pod. For prompts that wait, the gateway holds two requests at each pod (IN_FLIGHT_PER_INSTANCE), beside the event
# that is there: a target that these do not exceed would let a stage never grow.
_MOST_IN_FLIGHT: Final = 2.4
_LEAST_IN_FLIGHT: Final = 1.4  # that of the defaults: with less, pods idle between events
_UTILIZATION: Final = 0.7  # the default of target_utilization_percentage
_ROUND_SHARE: Final = 0.75  # of a token's mean time that a round of passes takes; events wait at pods for the rest
_FIRST_TOKENS: Final = 5  # times the seconds of a first token: the window
_WINDOW_SECONDS: Final = (6, 60)  # Knative's least and default
_LEAST_TIMEOUT_SECONDS: Final = 5  # a stage may hold a reply for 2 s, and a pass comes after it
_LEAST_CONCURRENCY: Final = 8
_PATH: Final = "$.objective"
_Seconds = Annotated[float, Meta(gt=0, le=3600)]


class ObjectiveSpec(Objective, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The objective for answers, and what it takes to derive settings from it."""

    # Measured: seconds of a decode pass of the slowest stage, with its hop, by the rows in it. At least for 1 row, such as
    # {1: 0.016, 16: 0.02}. Unset: targets and batches keep their defaults.
    pass_seconds: dict[Annotated[int, Meta(ge=1)], _Seconds] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = sorted(self.pass_seconds)
        if rows and rows[0] != 1:
            raise SpecError(f"{_PATH}.pass_seconds: begins with {rows[0]} rows; give the seconds of 1 row, too")
        for fewer, more in pairwise(rows):
            if self.pass_seconds[more] < self.pass_seconds[fewer]:
                raise SpecError(
                    f"{_PATH}.pass_seconds: {more} rows take {self.pass_seconds[more]:g} s, less than {fewer} rows with "
                    f"{self.pass_seconds[fewer]:g} s; measure them again on an idle stage"
                )


class Derived(Struct, frozen=True):
    """Settings that follow from an objective. A setting is None if the objective does not determine it."""

    window_seconds: int
    timeout_seconds: int  # of a stage's requests, and of a pod's drain
    scale_down_delay_seconds: int = 0  # what runs at a pod leaves it at once, and its KV is handed over
    target: float | None = None
    container_concurrency: int | None = None
    micro_batch_sequences: int | None = None


def derive(objective: ObjectiveSpec, stages: int) -> Derived:
    """The settings for a pipeline of `stages` stages. Raises SpecError if no setting can reach the objective.

    Knative's window is five times the first token's seconds, so that pods are wanted before a burst's answers are late. A pod
    that leaves has half of it, in place of queue-proxy's drain of 30 s, in which it would take a device and do nothing. With
    measured passes, the mean time of a token is the objective by 1.5: rows are added to a micro-batch until a round takes
    three quarters of it, and so many events may be at a pod as the mean time allows.
    """
    least, most = _WINDOW_SECONDS
    window = min(most, max(least, round(_FIRST_TOKENS * objective.first_token_seconds)))
    timeout = max(_LEAST_TIMEOUT_SECONDS, window // 2)
    if not objective.pass_seconds:
        return Derived(window, timeout)
    mean = objective.token_seconds / _TAIL
    alone = stages * objective.pass_seconds[1]
    if alone > mean:
        raise SpecError(
            f"{_PATH}.token_seconds: {objective.token_seconds:g} s cannot be kept for {objective.share:.0%} of answers: passes "
            f"of {stages} stages take {alone:g} s alone, {_TAIL:g} times that with waiting; use fewer stages, or allow "
            f"{math.ceil(_TAIL * alone * 1000) / 1000:g} s"
        )
    rows = max(rows for rows, seconds in objective.pass_seconds.items() if rows == 1 or stages * seconds <= _ROUND_SHARE * mean)
    in_flight = min(_MOST_IN_FLIGHT, max(_LEAST_IN_FLIGHT, mean / (stages * objective.pass_seconds[rows])))
    target = round(in_flight / _UTILIZATION, 2)
    concurrency = max(_LEAST_CONCURRENCY, math.ceil(2 * target) + 2)  # twice the target, and two for the memory backlog
    return Derived(window, timeout, target=target, container_concurrency=concurrency, micro_batch_sequences=rows)


def with_objective(document: Any) -> Any:
    """The parsed YAML of a spec with what its objective says in fields that it leaves open. Raises SpecError.

    Fields that are set stay as they are, and so does a document that has no valid objective: its faults are found later.
    """
    if not isinstance(document, Mapping) or document.get("objective") is None:
        return document
    try:
        objective = msgspec.convert(document["objective"], ObjectiveSpec, strict=False)
    except msgspec.ValidationError:
        return document
    cut, stages = document.get("cut"), document.get("stages")
    count = cut.count(",") + 1 if isinstance(cut, str) else stages
    parts = [document.get(name) or {} for name in ("stage", "gateway")]
    if not isinstance(count, int) or not all(isinstance(part, Mapping) for part in parts):
        return document
    derived = derive(objective, count)
    document = deepcopy(dict(document))
    gateway, stage = document.setdefault("gateway", {}) or {}, document.setdefault("stage", {}) or {}
    document["gateway"], document["stage"] = gateway, stage
    values = msgspec.structs.asdict(derived)
    _fill(gateway, values, ("micro_batch_sequences",))
    if not document.get("kv_store"):  # KV is saved after the drain, which must not be cut short then
        _fill(stage, values, ("timeout_seconds",))
    if not isinstance(scaling := stage.setdefault("autoscaling", {}), Mapping) or scaling.get("class", "kpa") != "kpa":
        return document
    _fill(scaling, values, ("window_seconds", "scale_down_delay_seconds", "target", "container_concurrency"))
    return document


def _fill(part: Any, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if values[name] is not None:
            part.setdefault(name, values[name])
