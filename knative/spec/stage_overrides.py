"""Stage overrides: fields in which some stages differ from the spec's `stage`."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from eventing.wire.events import Cut
from knative.spec.cut import format_cut
from knative.spec.errors import SpecError, describe_fault

S = TypeVar("S", bound=Struct)
PATH: Final = "$.stage_overrides"
_SELECTORS: Final = ("stage", "layers")


def overridden(base: S, overrides: Sequence[Mapping[str, Any]], cut: Cut) -> tuple[S, ...]:
    """Settings of each stage of the cut: `base`, changed by the overrides that select the stage.

    Later overrides win. Raises SpecError.
    """
    stages = [base] * len(cut)
    for number, override in enumerate(overrides):
        for index in _selected(override, cut, f"{PATH}[{number}]"):
            stages[index] = changed(stages[index], override, number)
    return tuple(stages)


def changed(base: S, override: Mapping[str, Any], number: int) -> S:
    """`base` changed by one override: mappings are merged, other values replaced. Raises SpecError.

    number: position of the override in the spec, for the message.
    """
    path = f"{PATH}[{number}]"
    change = {name: value for name, value in override.items() if name not in _SELECTORS}
    if len(set(_SELECTORS) & override.keys()) != 1:
        raise SpecError(f"{path}: needs exactly one of stage (a number, from 0) and layers (such as 0:10)")
    if not change:
        raise SpecError(f"{path}: changes nothing; name a field of $.stage")
    merged = _merged(msgspec.to_builtins(base), change)
    try:
        return msgspec.convert(merged, type(base))
    except msgspec.ValidationError as error:
        raise SpecError(describe_fault(merged, type(base), path)) from error


def _selected(override: Mapping[str, Any], cut: Cut, path: str) -> list[int]:
    if "stage" in override:
        index = override["stage"]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(cut):
            raise SpecError(f"{path}.stage: {index!r} is not one of the {len(cut)} stages, which are numbered from 0")
        return [index]
    begin, colon, end = str(override["layers"]).partition(":")
    if not (colon and begin.isdecimal() and end.isdecimal()):
        raise SpecError(f"{path}.layers: {override['layers']!r} is not a range of layers such as '0:10'")
    first, last = int(begin), int(end)
    inside = [index for index, group in enumerate(cut) if first <= group[0] and group[1] <= last]
    if not inside or cut[inside[0]][0] != first or cut[inside[-1]][1] != last:
        raise SpecError(f"{path}.layers: {first}:{last} does not begin and end with stages of the cut {format_cut(cut)}")
    return inside


def _merged(base: Any, change: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(change, Mapping):
        return change
    return {**base, **{name: _merged(base.get(name), value) for name, value in change.items()}}
