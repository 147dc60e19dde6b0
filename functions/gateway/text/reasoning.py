"""An answer's text, split into what the model thinks first, between <think> and </think>, and what it says."""

from typing import Final, Literal, NamedTuple

from functions.gateway.text.text_stream import overlap

BEGIN: Final = "<think>"
END: Final = "</think>"


class TextDelta(NamedTuple):
    kind: Literal["reasoning", "content"]
    text: str


def within(prompt: str) -> bool:
    """The prompt ends within thoughts, which its template has begun; a question may speak of the mark, too."""
    return prompt.rstrip().endswith(BEGIN)


class Reasoning:
    """Splits as text comes. Thoughts come first or not at all; empty lines around them belong to nobody."""

    def __init__(self, *, inside: bool) -> None:
        """inside: the answer begins within thoughts."""
        self._state: Literal["before", "inside", "behind", "content"] = "inside" if inside else "before"
        self._held = ""
        self._begun = False
        """Some thought has been given out."""

    def push(self, text: str) -> list[TextDelta]:
        """What is certain now."""
        self._held += text
        parts: list[TextDelta] = []
        while (part := self._next()) is not None:
            parts += [part] if part.text else []
        return parts

    def finish(self) -> list[TextDelta]:
        """The rest, which was no mark after all."""
        held, self._held = self._held, ""
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "inside" else "content"
        return [TextDelta(kind, held)] if held and self._state != "behind" else []

    def _next(self) -> TextDelta | None:
        """None where more has to come first."""
        if self._state == "before":
            return self._at_the_beginning()
        if self._state == "inside":
            return self._thought()
        if self._state == "behind":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if not self._held:
            return None
        said, self._held = self._held, ""
        return TextDelta("content", said)

    def _at_the_beginning(self) -> TextDelta | None:
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
            self._held, self._state = rest, "behind"
            return TextDelta("reasoning", thought.rstrip("\n"))
        # Empty lines are held, too: they may be the last ones.
        certain = self._held[: len(self._held) - overlap(self._held, END)].rstrip("\n")
        if not certain:
            return None
        self._held, self._begun = self._held[len(certain) :], True
        return TextDelta("reasoning", certain)
