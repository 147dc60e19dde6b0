"""Splits an answer's text into thoughts, content and tool calls while it is generated."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from functions.gateway.text.reasoning import Reasoning, TextDelta
from functions.gateway.text.text_stream import overlap
from functions.gateway.text.tool_formats import ToolFormat

_PYTHON_TAG: Final = "<|python_tag|>"  # Llama 3 may write it before a call
_MAX_HEAD_CHARACTERS: Final = 1024  # from a call's begin to the end of its name; longer text is no call


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of an answer: the beginning of a call with its name, or more of a call's arguments."""

    call: int  # number of the call, from 0 on
    name: str | None = None  # of the function, at the begin of its call only
    arguments: str = ""  # more text of the call's arguments


AnswerPart = TextDelta | ToolCallDelta


@dataclass(slots=True)
class _Nesting:
    """Finds the end of a JSON object in text that comes in pieces."""

    depth: int = 0  # brackets that are open
    in_string: bool = False
    escaped: bool = False

    def end(self, text: str) -> int | None:
        """Reads `text`, the next piece. Returns the position in it after the object's last character.

        Returns None if the object goes on.
        """
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
    """Splits the text of one answer, without its thoughts, into content and calls.

    Call `push` with each piece of text, then `finish`.
    """

    format: ToolFormat
    names: frozenset[str]  # of the tools; in a format without a marker, only these make a call
    calls: int = 0  # begun so far
    _text: str = ""  # not certain yet
    _state: str = "start"  # start, text, call (at its begin), arguments, rest (of its object), after (it)
    _nesting: _Nesting = field(default_factory=_Nesting)
    _marker: str = ""  # becomes text again if no call follows

    def push(self, text: str) -> list[AnswerPart]:
        """Adds text and returns the parts that are certain now. Text that may be the beginning of a call is held back."""
        self._text += text
        return list(self._deltas(at_end=False))

    def finish(self) -> list[AnswerPart]:
        """Returns the text that was held back. A call that has begun without a name becomes text."""
        deltas = list(self._deltas(at_end=True))
        held, self._text = self._marker + self._text, ""
        self._marker = ""
        return [*deltas, TextDelta("content", held)] if held.strip() and self._state in ("start", "text", "call") else deltas

    def _deltas(self, at_end: bool) -> Iterator[AnswerPart]:
        steps: dict[str, Callable[[bool], AnswerPart | None]] = {
            "start": self._at_start,
            "text": self._in_text,
            "call": self._at_call,
            "arguments": self._in_arguments,
            "rest": self._in_rest,
            "after": self._after_call,
        }
        while True:
            before = self._state, len(self._text)
            delta = steps[self._state](at_end)
            if delta is not None:
                yield delta
            if (self._state, len(self._text)) == before:
                return

    def _at_start(self, at_end: bool) -> None:
        """Decides whether the answer begins with a call, in a format without a marker."""
        begun = self._text.lstrip()
        if self.format.marker:
            self._state = "text"
        elif begun.startswith(_PYTHON_TAG):
            self._text, self._marker, self._state = begun[len(_PYTHON_TAG) :], _PYTHON_TAG, "call"
        elif begun and (at_end or not _PYTHON_TAG.startswith(begun)):
            self._state = "call" if begun[0] == "{" else "text"

    def _in_text(self, at_end: bool) -> TextDelta | None:
        marker = self.format.marker
        place = self._text.find(marker) if marker else -1
        if place >= 0:
            content, self._text = self._text[:place].rstrip(), self._text[place + len(marker) :]
            self._marker, self._state = marker, "call"
        else:
            certain = len(self._text)
            if marker and not at_end:  # white space before a marker is dropped, so it is held as well
                certain = len(self._text[: certain - overlap(self._text, marker)].rstrip())
            content, self._text = self._text[:certain], self._text[certain:]
        return TextDelta("content", content) if content else None

    def _at_call(self, at_end: bool) -> AnswerPart | None:
        opening = re.match(self.format.opening, self._text) or re.match(r"\s*", self._text)
        assert opening is not None
        at = opening.end()
        head = re.compile(self.format.head).match(self._text, at)
        if head is not None and (self.format.marker or head["name"] in self.names):
            self._text, self._marker = self._text[head.end() :], ""
            self._state, self._nesting = "arguments", _Nesting()
            self.calls += 1
            return ToolCallDelta(self.calls - 1, head["name"])
        rest = self._text[at:]
        end = _Nesting().end(rest) if head is None and rest.startswith("{") else None
        if end is not None and (whole := self._whole_call(rest, end)) is not None:
            return whole
        may_be_call = not rest or self.format.direct or (rest[0] == "{" and end is None)
        if head is None and may_be_call and not at_end and len(rest) <= _MAX_HEAD_CHARACTERS:
            return None
        # What was read is text and no call. A call may follow it.
        read = at + end if end is not None else len(self._text) if rest.startswith("{") else 0
        content, self._text = self._marker + self._text[:read], self._text[read:]
        self._marker, self._state = "", "text"
        return TextDelta("content", content) if content.strip() else None

    def _whole_call(self, text: str, end: int) -> ToolCallDelta | None:
        """Parses a complete call that the format's `head` does not match: its keys have another order, or it has no arguments.

        `text` begins with the call's object, which ends at `end`. Returns None if the object is no call.
        """
        try:
            call: Any = msgspec.json.decode(text[:end])  # refuses lone surrogates, which no text can hold
        except (ValueError, RecursionError):
            return None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not (self.format.marker or name in self.names):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        self._text, self._marker, self._state = text[end:], "", "after"
        self.calls += 1
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCallDelta(self.calls - 1, name, written)

    def _in_arguments(self, _: bool) -> ToolCallDelta | None:
        end = self._nesting.end(self._text)
        arguments = self._text[:end]
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._state, self._nesting = "after" if self.format.direct else "rest", _Nesting(depth=1)
        return ToolCallDelta(self.calls - 1, arguments=arguments) if arguments else None

    def _in_rest(self, _: bool) -> None:
        """Drops the text up to the brace that closes the call."""
        end = self._nesting.end(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._state = "after"

    def _after_call(self, at_end: bool) -> None:
        rest, closing = self._text.lstrip(), self.format.closing
        if closing and rest.startswith(closing):
            self._text, self._state = rest[len(closing) :].lstrip(), "text"
            return
        if not rest or (closing and closing.startswith(rest)) or at_end:
            self._text = "" if at_end else self._text
            return
        between = re.match(self.format.between, self._text)
        rest = self._text if between is None else self._text[between.end() :]
        if rest:
            self._text = rest
            self._state = "call" if rest[0] == "{" and self.format.name != "hermes" else "text"


@dataclass(frozen=True, slots=True)
class AnswerParts:
    """Splits the whole text of one answer into thoughts, content and tool calls.

    Call `push` with each piece of text, then `finish`. Read each iterator that they return to its end.
    """

    reasoning: Reasoning | None  # None: the answer has no thoughts
    parser: ToolCallParser | None  # None: the answer may call no tool

    def push(self, text: str) -> Iterator[AnswerPart]:
        if text:
            yield from self._parts([TextDelta("content", text)] if self.reasoning is None else self.reasoning.push(text))

    def finish(self) -> Iterator[AnswerPart]:
        if self.reasoning is not None:
            yield from self._parts(self.reasoning.finish())
        if self.parser is not None:
            yield from self.parser.finish()

    def _parts(self, texts: Iterable[TextDelta]) -> Iterator[AnswerPart]:
        for each in texts:
            if self.parser is None or each.kind == "reasoning":
                yield each
            else:
                yield from self.parser.push(each.text)
