"""Token ids → text as it becomes certain: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_LONGEST_CHARACTER_TOKENS: Final = 8
"""A character has at most 4 bytes, hence tokens; what is still no character behind so many never becomes one."""


class Detokenizer:
    """Text that tokens complete. What it has given out never changes, and all of it together is the answer's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Tokens whose text has been given out."""
        self._context = 0
        """Tokens from here to `_shown` are decoded along: how a token reads can depend on the one before it."""

    def push(self, token_id: int) -> str:
        """Empty while the token's last character lacks bytes."""
        self._ids.append(token_id)
        return self._take(final=len(self._ids) - self._shown > _LONGEST_CHARACTER_TOKENS)

    def finish(self) -> str:
        """What is left, however incomplete."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        after: str = self._tokenizer.decode(self._ids[self._context :])
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now; sets `found` when a stop string came, whose text is dropped with all behind it."""
        text = self.held + text
        places = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self.held = self.held, ""
        return held


class TextStream:
    """Both together."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stop_strings)
        self._incomplete = False

    @property
    def stopped(self) -> bool:
        """A stop string came: no token behind it counts."""
        return self._stops.found

    @property
    def holds(self) -> bool:
        """Some text of the tokens so far is not certain yet."""
        return not self.stopped and (self._incomplete or bool(self._stops.held))

    def push(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        self._incomplete = not text
        return self._stops.push(text)

    def finish(self) -> str:
        """The rest, after the last token."""
        if self.stopped:
            return ""
        text = self._stops.push(self._detokenizer.finish())
        return text if self.stopped else text + self._stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
