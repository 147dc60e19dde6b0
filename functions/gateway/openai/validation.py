"""Bytes → a request of the OpenAI API; what is wrong with it in a sentence that names the option and what stands there."""

import re
from typing import Any, Final, TypeVar

import msgspec

from eventing.problems import MalformedEvent
from eventing.wire.typed_json import decode_json

T = TypeVar("T")

_WITH_PATH: Final = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
_UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `(?P<name>.*?)`", re.DOTALL)
_SHOWN_CHARACTERS: Final = 60


def read_request(body: bytes, type_: type[T]) -> T:
    """Raises MalformedEvent."""
    try:
        return decode_json(body, type_)
    except msgspec.ValidationError as error:
        raise MalformedEvent(_sentence(str(error), _whatever(body))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the request is no JSON: {error}") from error


def _whatever(body: bytes) -> Any:
    """What is there, for the sentence; None where it cannot be read to its end, which was not looked at before."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _sentence(error: str, asked: Any) -> str:
    found = _WITH_PATH.fullmatch(error)
    what, path = (found["what"], found["path"]) if found else (error, "")
    if unknown := _UNKNOWN_FIELD.fullmatch(what):
        name = f"{path}.{unknown['name']}" if path else unknown["name"]
        return f"`{name}` is no option that is served here; leave it out"
    if not path:
        return f"the request cannot be served: {what}"
    what = what[:1].lower() + what[1:]
    return f"`{path}` is {_shown(_value(asked, path))}, which is not served here: {what}"


def _value(asked: Any, path: str) -> Any:
    """What stands at a path such as messages[0].role; where the library says only `[...]`, all that stands there."""
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        try:
            if name:
                asked = asked[name]
            elif index.isdecimal():
                asked = asked[int(index)]
            else:
                return asked
        except (KeyError, IndexError, TypeError):
            return asked
    return asked


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
