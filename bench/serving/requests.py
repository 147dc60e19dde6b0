"""What every contender of `bench.serving` is asked: texts of a stated number of tokens, drawn from a seed."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

_CORPUS: Final = (Path(__file__).parents[1] / "data" / "lighthouse.txt", Path(__file__).parents[2] / "LICENSE")
_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Request:
    text: str
    token_ids: tuple[int, ...]
    """Of `text`, as the model's own tokenizer reads it."""
    max_tokens: int


class Requests:
    """tokenizer: of the model that is measured."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._corpus: list[int] = tokenizer.encode("\n\n".join(file.read_text(encoding="utf-8") for file in _CORPUS)).ids

    def single(self, max_tokens: int) -> Request:
        """One stream: a prompt of 128 tokens."""
        return self._request(0, 128, max_tokens)

    def prefill(self) -> Request:
        """A prompt of 1,024 tokens, one token of answer."""
        return self._request(0, 1024, 1)

    def long(self) -> Request:
        """A prompt of 4,096 tokens, one token of answer."""
        return self._request(0, 4096, 1)

    def decoding(self, count: int, max_tokens: int) -> list[Request]:
        """Short prompts, so that what is measured is decoding."""
        return [self._request(97 * index, 64, max_tokens) for index in range(count)]

    def ragged(self, count: int) -> list[Request]:
        """Prompts of 16 to 512 and answers of 16 to 256 tokens."""
        draw = random.Random(_SEED)
        return [self._request(draw.randrange(2000), draw.randint(16, 512), draw.randint(16, 256)) for _ in range(count)]

    def text(self, start: int, length: int) -> str:
        """Of `length` tokens, from about token `start` of the corpus on."""
        return self._request(start, length, 1).text

    def _request(self, start: int, length: int, max_tokens: int) -> Request:
        """The first text from token `start` on that is read as exactly `length` tokens: cut anywhere, text may be read anew."""
        corpus = self._corpus * (1 + (start + 2 * length) // len(self._corpus))
        for first in range(start, start + length):
            text = self._tokenizer.decode(corpus[first : first + length], skip_special_tokens=False)
            token_ids = self._tokenizer.encode(text).ids
            if len(token_ids) == length:
                return Request(text, tuple(token_ids), max_tokens)
        raise ValueError(f"no text of {length} tokens from token {start} on: take another corpus")
