"""Token ids → text as it becomes certain: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_LONGEST_CHARACTER_TOKENS: Final = 8
"""A character has at most 4 bytes, hence tokens; what is still no character behind so many never becomes one."""
_LOOKED_AT_TOKENS: Final = 64
"""How far from a prompt's end a token is looked for that reads by itself. Special ones, and bytes, do not."""
_REPLACEMENT: Final = "\ufffd"


class Detokenizer:
    """Text that tokens complete. What it has given out never changes, and all of it together is the answer's text."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), special: bool = False) -> None:
        """before: the tokens that the answer continues; none, where it is a text of its own, as a chat's messages are.
        special: special tokens are text, too."""
        self._tokenizer = tokenizer
        self._skips = not special
        self._neighbour = _readable(tokenizer, before)
        """Tokens that come before, and are text by themselves. SentencePiece-like decoders drop the space of a text's first
        word, and take what has nothing before it for that."""
        self._stream = DecodeStream(self._neighbour, skip_special_tokens=self._skips)
        self._waiting: list[int] = []
        """Tokens whose text has not been given out."""

    def push(self, token_id: int) -> str:
        """Empty while the token's last character lacks bytes."""
        self._waiting.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - the library has no class for it: bytes behind whole characters undid these
            return self._take_what_waits()
        if text is None:
            return self._take_what_waits() if len(self._waiting) > _LONGEST_CHARACTER_TOKENS else ""
        self._neighbour, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        """What is left, however incomplete."""
        return self._take_what_waits() if self._waiting else ""

    def _take_what_waits(self) -> str:
        before: str = self._tokenizer.decode(self._neighbour, skip_special_tokens=self._skips)
        text: str = self._tokenizer.decode(self._neighbour + self._waiting, skip_special_tokens=self._skips)
        # Bytes behind bytes undo these here as well; but where bytes come first, no word does.
        text = (
            text[len(before) :]
            if text.startswith(before)
            else self._tokenizer.decode(self._waiting, skip_special_tokens=self._skips)
        )
        self._neighbour = _readable(self._tokenizer, self._waiting) or self._neighbour
        self._waiting = []
        self._stream = DecodeStream(self._neighbour, skip_special_tokens=self._skips)
        return text


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stop_strings: Sequence[str], *, included: bool = False) -> None:
        """included: the text ends behind the stop string, not before it."""
        self._stop_strings = stop_strings
        self._included = included
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now; sets `found` when a stop string came, whose text is dropped with all behind it."""
        text = self.held + text
        places = [(place, len(stop)) for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            place, length = min(places)
            return text[: place + length] if self._included else text[:place]
        certain = len(text) - max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self.held = self.held, ""
        return held


class TextStream:
    """Both together."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        before: Sequence[int] = (),
        *,
        stop_included: bool = False,
        special: bool = False,
    ) -> None:
        """before: the tokens that the answer continues, special: whether special tokens are text, as `Detokenizer` has them."""
        self._detokenizer = Detokenizer(tokenizer, before, special)
        self._stops = StopStrings(stop_strings, included=stop_included)
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


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)


def _readable(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """The last token that is text by itself, as a list; an empty one where none is near."""
    for token_id in reversed(token_ids[-_LOOKED_AT_TOKENS:]):
        text = tokenizer.decode([token_id])
        if text and not text.endswith(_REPLACEMENT):
            return [token_id]
    return []
