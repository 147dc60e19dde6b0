"""Errors in a spec or a model, one class per condition."""

from typing import Any

from eventing.wire.faults import find_fault


class SpecError(ValueError):
    """The spec cannot be used. The message names the path and the value, and says what is allowed."""


class TooManyStages(ValueError):
    """The model has fewer layers than the pipeline has stages."""


class UnknownShape(ValueError):
    """The model's sizes cannot be derived. The message names the missing part and the place that was searched."""


def describe_fault(document: Any, type_: type, path: str) -> str:
    """A message that says where and why the document does not fit its type.

    path: where in the spec the document is; paths inside it are appended.
    """
    fault = find_fault(document, type_)
    if fault is None:
        return f"{path}: no valid {type_.__name__}"
    separator = "." if fault.path and not fault.path.startswith("[") else ""
    seen = repr(fault.value)
    expected = fault.expected or "unknown field"
    return f"{path}{separator}{fault.path}: {expected}, seen {seen if len(seen) <= 80 else seen[:77] + '...'}"
