"""Text → token ids. Refuses texts that cannot fit into the context early, and does not block other threads."""

import threading
from typing import Final

from tokenizers import Tokenizer

from eventing.problems import ContextExceeded

_LONG_CHARACTERS: Final = 65_536
_CONCURRENT_LONG_TEXTS: Final = 2  # longer texts take turns, to leave memory and cores to others
_MAX_COMPOSED_CHARACTERS: Final = 4  # that Unicode normalization (UAX 15) may turn into one
_MARGIN: Final = 1.5
"""A text cannot fit if a prefix of it has more than so many contexts of tokens. The margin is for the prefix's last word, which
may be cut and then has a few more tokens than in the whole text."""


class Encoder:
    """Thread-safe. Accepts every text that fits, provided that the tokenizer drops no characters."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        composed = 1 if tokenizer.normalizer is None else _MAX_COMPOSED_CHARACTERS
        self.max_characters = context_length * self._longest_token * composed  # of a text that can fit into the context
        self._long_texts = threading.BoundedSemaphore(_CONCURRENT_LONG_TEXTS)

    def check(self, characters: int) -> None:
        """Raises ContextExceeded if no text of this length can fit."""
        if characters > self.max_characters:
            raise ContextExceeded(
                f"the text has {characters} characters; the model's context is {self._context_length} tokens, which is "
                f"{self.max_characters} characters at most; shorten it"
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises ContextExceeded for a text that cannot fit, without encoding much more than would fit."""
        self.check(len(text))
        if len(text) <= _LONG_CHARACTERS:
            return self._encode_growing(text, add_special_tokens)
        with self._long_texts:
            return self._encode_growing(text, add_special_tokens)

    def _encode_growing(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tries prefixes of doubling length first, so that memory holds at most about three contexts of tokens."""
        length = 2 * self._context_length
        while length < len(text):
            if len(self._encode(text[:length], False)) > _MARGIN * self._context_length + self._longest_token:
                raise ContextExceeded(
                    f"the first {length} of the text's {len(text)} characters alone have more tokens than the model's context "
                    f"is {self._context_length}; shorten it"
                )
            length *= 2
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The library releases the GIL for batches but not for single texts. `fast` omits offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids
