"""Text → token ids, bounded before it is begun, and without holding up other threads."""

import threading
from typing import Final

from tokenizers import Tokenizer

from eventing.problems import ContextExceeded

_LONG_CHARACTERS: Final = 65_536
_LONG_AT_ONCE: Final = 2
"""Longer texts take turns: memory and cores are for the others, too."""
_COMPOSED_CHARACTERS: Final = 4
"""At most so many characters become one by Unicode normalization (UAX 15)."""
_SURELY: Final = 1.5
"""A beginning that has so many times the context's tokens cannot be that of a text which fits: its own end, cut somewhere
within a word, has a few more than it would have in the whole text."""


class Encoder:
    """Thread-safe. Nothing is refused that a tokenizer which keeps all characters could get into the context."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        composed = 1 if tokenizer.normalizer is None else _COMPOSED_CHARACTERS
        self.most_characters = context_length * self._longest_token * composed
        """A longer text has more tokens than the context, whatever they are."""
        self._long = threading.BoundedSemaphore(_LONG_AT_ONCE)

    def check(self, characters: int) -> None:
        """Raises InvalidRequest where a text of so many characters cannot fit."""
        if characters > self.most_characters:
            raise ContextExceeded(
                f"the text has {characters} characters; the model's context is {self._context_length} tokens, which is "
                f"{self.most_characters} characters at most; shorten it"
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequest for a text that cannot fit, having looked at little more than would fit."""
        self.check(len(text))
        if len(text) <= _LONG_CHARACTERS:
            return self._bounded(text, add_special_tokens)
        with self._long:
            return self._bounded(text, add_special_tokens)

    def _bounded(self, text: str, add_special_tokens: bool) -> list[int]:
        """Beginnings of twice the length each time, so that no more than about three contexts of tokens are ever in memory."""
        length = 2 * self._context_length
        while length < len(text):
            if len(self._encode(text[:length], False)) > _SURELY * self._context_length + self._longest_token:
                raise ContextExceeded(
                    f"the first {length} of the text's {len(text)} characters alone have more tokens than the model's context "
                    f"is {self._context_length}; shorten it"
                )
            length *= 2
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # For batches the library lets go of the GIL, for single texts it does not; `fast`: without places in the text.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids
