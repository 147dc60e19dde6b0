"""Pieces that differ: what some stages have otherwise than `stage` says of all."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from eventing.wire.events import Cut
from knative.spec.cut import format_cut
from knative.spec.errors import SpecError

S = TypeVar("S", bound=Struct)
PATH: Final = "$.stage_overrides"
_SELECTORS: Final = ("stage", "layers")


def overridden(base: S, overrides: Sequence[Mapping[str, Any]], cut: Cut) -> tuple[S, ...]:
    """Of every stage of the cut: `base` with the overrides that select it, a later one over an earlier. Raises SpecError."""
    stages = [base] * len(cut)
    for number, override in enumerate(overrides):
        for index in _selected(override, cut, f"{PATH}[{number}]"):
            stages[index] = changed(stages[index], override, number)
    return tuple(stages)


def changed(base: S, override: Mapping[str, Any], number: int) -> S:
    """`base` with this override; mappings are merged, everything else is replaced. Raises SpecError."""
    path = f"{PATH}[{number}]"
    change = {name: value for name, value in override.items() if name not in _SELECTORS}
    if len(set(_SELECTORS) & override.keys()) != 1:
        raise SpecError(f"{path}: exactly one of stage (its number, from 0 on) and layers (such as 0:10) says whom it is for")
    if not change:
        raise SpecError(f"{path}: nothing of it differs; name a field of $.stage")
    try:
        return msgspec.convert(_merged(msgspec.to_builtins(base), change), type(base))
    except msgspec.ValidationError as error:
        raise SpecError(_placed(str(error), path, change)) from error


def _selected(override: Mapping[str, Any], cut: Cut, path: str) -> list[int]:
    if "stage" in override:
        index = override["stage"]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(cut):
            raise SpecError(f"{path}.stage: {index!r} is none of the {len(cut)} stages, which are numbered from 0 on")
        return [index]
    first, last = _layers(override["layers"], path)
    inside = [index for index, group in enumerate(cut) if first <= group[0] and group[1] <= last]
    if not inside or cut[inside[0]][0] != first or cut[inside[-1]][1] != last:
        raise SpecError(f"{path}.layers: {first}:{last} begins and ends with no stages of the cut {format_cut(cut)}")
    return inside


def _layers(text: Any, path: str) -> tuple[int, int]:
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise SpecError(f"{path}.layers: {text!r} is no range of layers such as '0:10'")
    return int(first), int(last)


def _merged(base: Any, change: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(change, Mapping):
        return change
    return {**base, **{name: _merged(base.get(name), value) for name, value in change.items()}}


def _placed(message: str, path: str, change: Mapping[str, Any]) -> str:
    """msgspec says what it expected and where in the stage; said is where in the spec."""
    text, _, rest = message.partition(" - at `")
    where = path + rest.rstrip("`").removeprefix("$")
    return f"{where}: {text}, seen {dict(change)!r}"
