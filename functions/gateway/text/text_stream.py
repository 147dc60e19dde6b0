"""Turns token ids into text as soon as the text is certain: its characters are complete, and no stop string may begin in it."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_MAX_CHARACTER_TOKENS: Final = 8  # a character has at most 4 bytes, so at most 4 tokens; after 8 it never becomes whole
_SEARCHED_TOKENS: Final = 64  # searched at a prompt's end for one that is text by itself, unlike special tokens and bytes
_REPLACEMENT: Final = "\ufffd"


class Detokenizer:
    """Decodes an answer token by token. Text that was returned never changes. All of it together is the answer's text."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), special: bool = False) -> None:
        """`before` are tokens that the answer continues. Empty for a text of its own, such as a chat message.

        If `special`, special tokens become text, too. Otherwise they are skipped.
        """
        self._tokenizer = tokenizer
        self._skip_special = not special
        # A token before the answer that is text by itself. Without it, SentencePiece-like decoders take the answer's first word
        # for that of a text and drop the space before it.
        self._context = _readable(tokenizer, before)
        self._stream = DecodeStream(self._context, skip_special_tokens=self._skip_special)
        self._pending: list[int] = []  # tokens whose text has not been returned

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes. Empty while the last character lacks bytes."""
        self._pending.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - the library has no class for it: bytes after whole characters undid these
            return self._flush()
        if text is None:
            return self._flush() if len(self._pending) > _MAX_CHARACTER_TOKENS else ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Returns the rest of the text, after the last token, even if its last character is incomplete."""
        return self._flush() if self._pending else ""

    def _flush(self) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        # Bytes after bytes may undo these here as well. No word begins with bytes, so it loses no space without its context.
        text = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        self._context = _readable(self._tokenizer, self._pending) or self._context
        self._pending = []
        self._stream = DecodeStream(self._context, skip_special_tokens=self._skip_special)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text


class StopStrings:
    """Ends a text at the first stop string. Holds text back while it may be the beginning of one."""

    def __init__(self, stop_strings: Sequence[str], *, included: bool = False) -> None:
        """If `included`, the text ends after the stop string instead of before it."""
        self._stop_strings = stop_strings
        self._included = included
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Returns the text that is certain now. Sets `found` at the first stop string, and drops everything after it."""
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
        """Returns the text that was held back. Call it after the last `push`."""
        held, self.held = self.held, ""
        return held


class TextStream:
    """Turns one answer's tokens into text that ends at the first stop string: a Detokenizer followed by StopStrings.

    `before` and `special` are as in Detokenizer, and `stop_included` is `included` in StopStrings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        before: Sequence[int] = (),
        *,
        stop_included: bool = False,
        special: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, before, special)
        self._stops = StopStrings(stop_strings, included=stop_included)
        self._incomplete = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Tokens after it are no part of the answer."""
        return self._stops.found

    @property
    def holds(self) -> bool:
        """Whether some text of the tokens so far is not certain yet."""
        return not self.stopped and (self._incomplete or bool(self._stops.held))

    def push(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        self._incomplete = not text
        return self._stops.push(text)

    def finish(self) -> str:
        """Returns the rest of the text, after the last token. It may set `stopped`."""
        if self.stopped:
            return ""
        text = self._stops.push(self._detokenizer.finish())
        return text if self.stopped else text + self._stops.finish()


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `stop`, but not the whole of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)


def _readable(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """Returns the last token that is text by itself, as a list. Empty if none of the last _SEARCHED_TOKENS is."""
    for token_id in reversed(token_ids[-_SEARCHED_TOKENS:]):
        text = tokenizer.decode([token_id])
        if text and not text.endswith(_REPLACEMENT):
            return [token_id]
    return []
