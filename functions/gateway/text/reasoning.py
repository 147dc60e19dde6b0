"""Splits an answer's text into content and the thoughts before it, which are between <think> and </think>."""

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

from functions.gateway.text.text_stream import overlap

BEGIN: Final = "<think>"
END: Final = "</think>"


class TextDelta(NamedTuple):
    kind: Literal["reasoning", "content"]
    text: str


def thoughts_apart(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the turns with the assistant's thoughts moved from `content` to `reasoning_content`."""
    found = []
    for turn in turns:
        if turn["role"] == "assistant" and END in turn["content"]:
            reasoning = Reasoning(inside=BEGIN not in turn["content"].partition(END)[0])
            parts = [*reasoning.push(turn["content"]), *reasoning.finish()]
            thoughts, content = ("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content"))
            found.append({**turn, "content": content, "reasoning_content": thoughts})
        else:
            found.append(turn)
    return found


class Reasoning:
    """Splits one answer's text into thoughts and content while it is generated. Drops empty lines around thoughts."""

    def __init__(self, *, inside: bool) -> None:
        """If `inside`, the answer begins with thoughts, without a <think> of its own."""
        self._state: Literal["before", "inside", "after", "content"] = "inside" if inside else "before"
        self._held = ""
        self._begun = False  # part of the thoughts has been returned

    def push(self, text: str) -> list[TextDelta]:
        """Adds text and returns the parts that are certain now. Text that may be the beginning of a mark is held back."""
        self._held += text
        parts: list[TextDelta] = []
        while (part := self._next()) is not None:
            parts += [part] if part.text else []
        return parts

    def finish(self) -> list[TextDelta]:
        """Returns the text that was held back. Call it after the last `push`."""
        held, self._held = self._held, ""
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "inside" else "content"
        return [TextDelta(kind, held)] if held and self._state != "after" else []

    def _next(self) -> TextDelta | None:
        """Removes the next part from the held text and returns it. Returns None if more text is needed.

        The part's text may be empty.
        """
        if self._state == "before":
            return self._first()
        if self._state == "inside":
            return self._thought()
        if self._state == "after":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if not self._held:
            return None
        content, self._held = self._held, ""
        return TextDelta("content", content)

    def _first(self) -> TextDelta | None:
        seen = self._held.lstrip()
        if seen.startswith(BEGIN):
            self._held, self._state = seen[len(BEGIN) :], "inside"
            return TextDelta("reasoning", "")
        if BEGIN.startswith(seen):
            return None
        self._state = "content"
        return TextDelta("content", "")

    def _thought(self) -> TextDelta | None:
        if not self._begun:
            self._held = self._held.lstrip("\n")
        thought, mark, rest = self._held.partition(END)
        if mark:
            self._held, self._state = rest, "after"
            return TextDelta("reasoning", thought.rstrip("\n"))
        # Empty lines are held too: they may be the last ones.
        certain = self._held[: len(self._held) - overlap(self._held, END)].rstrip("\n")
        if not certain:
            return None
        self._held, self._begun = self._held[len(certain) :], True
        return TextDelta("reasoning", certain)
