"""Finds where a document does not fit its type, so that an error message can name the path.

msgspec reports a fault only in words, which differ between its versions. So the document is compared with its type again here.
"""

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import inspect

_KINDS: Final[dict[type[inspect.Type], tuple[type | tuple[type, ...], str]]] = {
    inspect.NoneType: (type(None), "null"),
    inspect.BoolType: (bool, "true or false"),
    inspect.IntType: (int, "a whole number"),
    inspect.FloatType: ((int, float), "a number"),
    inspect.StrType: (str, "a text"),
    inspect.VarTupleType: (list, "an array"),
    inspect.ListType: (list, "an array"),
    inspect.TupleType: (list, "an empty array"),
    inspect.DictType: (dict, "an object"),
    inspect.StructType: (dict, "an object"),
}
"""What JSON has for a type, and its name in an error. All that requests and specs use."""
_BOUNDS: Final = (  # of a type: msgspec's name, what an error calls it, whether a value or its length keeps it
    ("ge", "at least", operator.ge),
    ("gt", "above", operator.gt),
    ("le", "at most", operator.le),
    ("lt", "below", operator.lt),
    ("min_length", "length at least", operator.ge),
    ("max_length", "length at most", operator.le),
)
_MAX_COMPARISONS: Final = 20_000  # a tenth of a second; a request of 8 MiB has millions of values


@dataclass(frozen=True, slots=True)
class Fault:
    """One place at which a document does not fit its type."""

    path: str  # such as messages[0].role; empty: the document itself
    value: Any  # what was found at the path
    expected: str  # what is allowed there; empty: the type has no such field


def find_fault(document: Any, type_: type) -> Fault | None:
    """Returns the first fault of a document (what JSON or YAML decodes to), in the order in which the decoder reads it.

    Returns None if the document fits, or if the fault comes after _MAX_COMPARISONS values.
    """
    try:
        return _Search().fault(document, inspect.type_info(type_), "")
    except _TooManyValues:
        return None


class _TooManyValues(Exception):
    pass


@dataclass
class _Search:
    """Compares a document with its type, value by value, up to the first fault."""

    _compared: int = 0

    def fault(self, value: Any, expected: inspect.Type, path: str) -> Fault | None:
        self._compared += 1
        if self._compared > _MAX_COMPARISONS:
            raise _TooManyValues
        if isinstance(expected, inspect.Metadata):  # a description
            expected = expected.type
        if isinstance(expected, inspect.UnionType):
            return self._union_fault(value, expected, path)
        if not _is_kind(value, expected) or not _is_within_bounds(value, expected):
            return Fault(path, value, f"expected {describe(expected)}")
        if isinstance(expected, inspect.StructType):
            return self._struct_fault(value, expected, path)
        inner: Iterator[tuple[str, Any]]
        if isinstance(expected, inspect.VarTupleType | inspect.ListType):
            item_type, inner = expected.item_type, ((f"[{index}]", each) for index, each in enumerate(value))
        elif isinstance(expected, inspect.DictType):
            item_type, inner = expected.value_type, ((f".{name}", each) for name, each in value.items())
        else:
            return None
        return next(filter(None, (self.fault(each, item_type, path + key) for key, each in inner)), None)

    def _struct_fault(self, value: dict[str, Any], expected: inspect.StructType, path: str) -> Fault | None:
        fields = {field.encode_name: field for field in expected.fields}
        for name, each in value.items():
            inner = f"{path}.{name}" if path else name
            if name in fields:
                if (fault := self.fault(each, fields[name].type, inner)) is not None:
                    return fault
            elif name == expected.tag_field:
                if each != expected.tag:
                    return Fault(inner, each, f"expected {_quoted([expected.tag])}")
            elif expected.forbid_unknown_fields:
                return Fault(inner, each, "")
        for name, field in fields.items():
            if field.required and name not in value:
                return Fault(path, value, f"it lacks `{name}`")
        try:
            msgspec.convert(value, expected.cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, ValueError):  # of the struct's own __post_init__
                return Fault(path, value, str(error.__cause__))
        return None

    def _union_fault(self, value: Any, expected: inspect.UnionType, path: str) -> Fault | None:
        """Returns the fault of a value that may have one of several types; None if the value fits one of them.

        If exactly one of these types has the value's JSON type or tag, the value is compared with it. Otherwise the whole value
        is the fault.
        """
        meant = [each for each in expected.types if _is_kind(value, each)]
        tagged = {each.tag: each for each in meant if isinstance(each, inspect.StructType) and each.tag_field}
        if len(tagged) > 1:
            name = str(next(iter(tagged.values())).tag_field)
            if name not in value:
                return Fault(path, value, f"it lacks `{name}`")
            if value[name] not in tagged:
                return Fault(f"{path}.{name}", value[name], f"expected {_quoted(tagged)}")
            return self._struct_fault(value, tagged[value[name]], path)
        faults = [self.fault(value, each, path) for each in meant]
        if len(faults) == 1 or None in faults:
            return faults[0] if len(faults) == 1 else None
        return Fault(path, value, f"expected {describe(expected)}")


def _is_kind(value: Any, expected: inspect.Type) -> bool:
    if isinstance(expected, inspect.LiteralType):
        return any(type(value) is type(each) and value == each for each in expected.values)
    if type(expected) not in _KINDS:
        return True
    return isinstance(value, _KINDS[type(expected)][0]) and (not isinstance(value, bool) or type(expected) is inspect.BoolType)


def _is_within_bounds(value: Any, expected: inspect.Type) -> bool:
    if isinstance(expected, inspect.TupleType):
        return len(value) == len(expected.item_types)
    if isinstance(expected, inspect.StrType) and expected.pattern:
        return re.search(expected.pattern, value) is not None
    size = len(value) if isinstance(value, str | list | dict) else value
    bounds = ((getattr(expected, name, None), allows) for name, _, allows in _BOUNDS)
    return all(bound is None or allows(size, bound) for bound, allows in bounds)


def describe(expected: inspect.Type) -> str:
    """Describes in words which values a type accepts. Null is left out if there are alternatives."""
    if isinstance(expected, inspect.Metadata):
        return describe(expected.type)
    if isinstance(expected, inspect.UnionType):
        return " or ".join(dict.fromkeys(describe(each) for each in expected.types if not isinstance(each, inspect.NoneType)))
    if isinstance(expected, inspect.LiteralType):
        return _quoted(expected.values)
    described = _KINDS[type(expected)][1]
    if isinstance(expected, inspect.StrType) and expected.pattern:
        return f"{described} that matches {expected.pattern}"
    bounds = [f"{words} {bound}" for name, words, _ in _BOUNDS if (bound := getattr(expected, name, None)) is not None]
    return f"{described}, {' and '.join(bounds)}" if bounds else described


def _quoted(values: Iterable[Any]) -> str:
    return " or ".join(msgspec.json.encode(each).decode() for each in values)
