"""Decodes JSON as a typed request. An error names the option, the value that was seen, and what is allowed."""

from typing import Final, TypeVar

import msgspec

from eventing.problems import MalformedEvent
from eventing.wire.faults import find_fault
from eventing.wire.framing import decode_json

T = TypeVar("T")

_SHOWN_CHARACTERS: Final = 60


def read_request(body: bytes, type_: type[T]) -> T:
    """Decodes a request's body as `type_`. Raises MalformedEvent with a sentence for the client."""
    try:
        return decode_json(body, type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(_explain(body, type_)) from error


def _explain(body: bytes, type_: type) -> str:
    try:
        request = msgspec.json.decode(body)
        fault = find_fault(request, type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"the request is no JSON: {error}"
    if fault is None:
        return f"the request is no {type_.__name__}; see /openapi.json"
    if not fault.expected:
        return f"`{fault.path}` is no option that is served here; leave it out"
    if not fault.path:
        return f"the request cannot be served: {fault.expected}"
    shown = msgspec.json.encode(fault.value).decode()
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}…"
    return f"`{fault.path}` is {shown}, which is not served here: {fault.expected}"
