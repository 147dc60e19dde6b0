"""Text → token ids. Refuses texts that cannot fit into the context early, and does not block other threads."""

import threading
from typing import Final

from tokenizers import Tokenizer

from eventing.problems import ContextExceeded

_LONG_CHARACTERS: Final = 65_536
_CONCURRENT_LONG_TEXTS: Final = 2  # encoded at the same time, to leave memory and cores to other requests
_MAX_COMPOSED_CHARACTERS: Final = 4  # characters that Unicode normalization (UAX 15) may turn into one
_MARGIN: Final = 1.5
"""A text is refused if a prefix of it has more tokens than the context times this number. The margin is for the prefix's last
word, which may be cut and then has a few more tokens than in the whole text."""


class Encoder:
    """Encodes texts, and refuses early those that cannot fit into the model's context. Thread-safe.

    It accepts every text that fits, provided that the tokenizer drops no characters.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        composed = 1 if tokenizer.normalizer is None else _MAX_COMPOSED_CHARACTERS
        self.max_characters = context_length * self._longest_token * composed  # of a text that can fit
        self._long_texts = threading.BoundedSemaphore(_CONCURRENT_LONG_TEXTS)

    def check(self, characters: int) -> None:
        """Raises ContextExceeded if no text with this number of characters can fit."""
        if characters > self.max_characters:
            seen = f"your text has {characters} characters or more, and that many tokens hold {self.max_characters} at most"
            raise ContextExceeded.by(seen, self._context_length)

    def encode(self, text: str, *, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None) -> list[int]:
        """Returns the text's token ids. Raises ContextExceeded if it cannot fit, without encoding much more than would fit.

        If `add_special_tokens`, adds those that surround a prompt. A part of an answer has none. `tokenizer` is one with the
        same tokens, to use instead of the Encoder's own.
        """
        self.check(len(text))
        if len(text) <= _LONG_CHARACTERS:
            return self._encode_growing(text, add_special_tokens, tokenizer or self._tokenizer)
        with self._long_texts:
            return self._encode_growing(text, add_special_tokens, tokenizer or self._tokenizer)

    def _encode_growing(self, text: str, add_special_tokens: bool, tokenizer: Tokenizer) -> list[int]:
        """Encodes prefixes of doubling length first, so that at most about three contexts of tokens are in memory."""
        length = 2 * self._context_length
        while length < len(text):
            if len(_encode(text[:length], False, tokenizer)) > _MARGIN * self._context_length + self._longest_token:
                seen = f"your text has {len(text)} characters, of which the first {length} alone are more tokens"
                raise ContextExceeded.by(seen, self._context_length)
            length *= 2
        return _encode(text, add_special_tokens, tokenizer)


def _encode(text: str, add_special_tokens: bool, tokenizer: Tokenizer) -> list[int]:
    # The library releases the GIL for batches but not for single texts. `fast` omits offsets.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids
