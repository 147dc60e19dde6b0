"""An answer's text → what it says, and the calls in it, as they come."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from functions.gateway.text.tool_formats import ToolFormat

_PYTHON_TAG: Final = "<|python_tag|>"
"""Llama 3 may write it ahead of a call."""
_LONGEST_HEAD: Final = 1024
"""Characters in which a call must have said its name."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What has become certain: text of the answer, or the begin of a call with its name, or more of its arguments."""

    content: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class _Nesting:
    """Of a JSON object."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def end(self, text: str) -> int | None:
        """Behind the object's last character in `text`, which continues what was looked at before; None: it goes on."""
        for place, character in enumerate(text):
            if self.in_string:
                if self.escaped:
                    self.escaped = False
                elif character == "\\":
                    self.escaped = True
                elif character == '"':
                    self.in_string = False
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "]}":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
        return None


@dataclass(slots=True)
class ToolCallParser:
    """names: of the tools; what calls none of them where no marker says that it is a call is text."""

    format: ToolFormat
    names: frozenset[str]
    calls: int = 0
    """Begun so far."""
    _text: str = ""
    """Not certain yet."""
    _state: str = "start"
    """start, text, call (at the begin of one), arguments, rest (of a call's object), behind (a call)."""
    _nesting: _Nesting = field(default_factory=_Nesting)
    _marker: str = ""
    """What has to be given back where it is no call after all."""

    def push(self, text: str) -> list[ToolCallDelta]:
        self._text += text
        return list(self._parts(at_end=False))

    def finish(self) -> list[ToolCallDelta]:
        """What was held back."""
        parts = list(self._parts(at_end=True))
        left, self._text = self._marker + self._text, ""
        self._marker = ""
        return [*parts, ToolCallDelta(left)] if left.strip() and self._state in ("start", "text", "call") else parts

    def _parts(self, at_end: bool) -> Iterator[ToolCallDelta]:
        steps = {
            "start": self._start,
            "text": self._plain,
            "call": self._head,
            "arguments": self._arguments,
            "rest": self._rest,
            "behind": self._behind,
        }
        while True:
            before = self._state, len(self._text)
            part = steps[self._state](at_end)
            if part is not None:
                yield part
            if (self._state, len(self._text)) == before:
                return

    def _start(self, at_end: bool) -> None:
        """Whether the answer itself is a call, where no marker begins them."""
        begun = self._text.lstrip()
        if self.format.marker:
            self._state = "text"
        elif begun.startswith(_PYTHON_TAG):
            self._text, self._marker, self._state = begun[len(_PYTHON_TAG) :], _PYTHON_TAG, "call"
        elif begun and (at_end or not _PYTHON_TAG.startswith(begun)):
            self._state = "call" if begun[0] == "{" else "text"

    def _plain(self, at_end: bool) -> ToolCallDelta | None:
        marker = self.format.marker
        place = self._text.find(marker) if marker else -1
        if place >= 0:
            content, self._text = self._text[:place].rstrip(), self._text[place + len(marker) :]
            self._marker, self._state = marker, "call"
        else:
            held = 0 if at_end else _held(self._text, marker)
            content, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return ToolCallDelta(content) if content else None

    def _head(self, at_end: bool) -> ToolCallDelta | None:
        opening = self.format.opening.match(self._text) or re.match(r"\s*", self._text)
        assert opening is not None
        at = opening.end()
        head = self.format.head.match(self._text, at)
        if head is not None and (self.format.marker or head["name"] in self.names):
            self._text, self._marker = self._text[head.end() :], ""
            self._state, self._nesting = "arguments", _Nesting()
            self.calls += 1
            return ToolCallDelta(call=self.calls - 1, name=head["name"])
        left = self._text[at:]
        end = _Nesting().end(left) if head is None and left.startswith("{") else None
        if end is not None and (whole := self._whole(left, end)) is not None:
            return whole
        wanted = not left or self.format.direct or (left[0] == "{" and end is None)
        if head is not None or not wanted or at_end or len(left) > _LONGEST_HEAD:
            # Text as far as it was looked at; another call may follow.
            seen = at + end if end is not None else len(self._text) if left.startswith("{") else 0
            content, self._text = self._marker + self._text[:seen], self._text[seen:]
            self._marker, self._state = "", "text"
            return ToolCallDelta(content) if content.strip() else None
        return None

    def _whole(self, left: str, end: int) -> ToolCallDelta | None:
        """A call whose keys come in another order, or that has no arguments, now that all of it is there."""
        call = _object(left[:end])
        name = call.get("name")
        if not isinstance(name, str) or not (self.format.marker or name in self.names):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        self._text, self._marker, self._state = left[end:], "", "behind"
        self.calls += 1
        said = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCallDelta(call=self.calls - 1, name=name, arguments=said)

    def _arguments(self, _: bool) -> ToolCallDelta | None:
        end = self._nesting.end(self._text)
        said = self._text[:end]
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._state, self._nesting = "behind" if self.format.direct else "rest", _Nesting(depth=1)
        return ToolCallDelta(call=self.calls - 1, arguments=said) if said else None

    def _rest(self, _: bool) -> None:
        """Up to the brace that closes the call."""
        end = self._nesting.end(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._state = "behind"

    def _behind(self, at_end: bool) -> None:
        left, closing = self._text.lstrip(), self.format.closing
        if closing and left.startswith(closing):
            self._text, self._state = left[len(closing) :].lstrip(), "text"
            return
        if not left or (closing and closing.startswith(left)) or at_end:
            self._text = "" if at_end else self._text
            return
        between = self.format.between.match(self._text)
        left = self._text if between is None else self._text[between.end() :]
        if left:
            self._text = left
            self._state = "call" if left[0] == "{" and self.format.name != "hermes" else "text"


def _object(text: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text)  # no half of a surrogate pair, which is no text
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(text: str, marker: str) -> int:
    """Characters at the end of `text` that could come before a marker or begin one."""
    if not marker:
        return 0
    longest = min(len(text), len(marker) - 1)
    begun = next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())
