"""The requests for every contender of `bench.serving`: texts of a stated number of tokens, drawn from a seed."""

import random
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from bench.report import ROOT

_CORPUS: Final = (ROOT / "bench" / "data" / "lighthouse.txt", ROOT / "LICENSE")
_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Request:
    text: str
    token_ids: tuple[int, ...]  # of `text`, by the model's own tokenizer
    max_tokens: int


class Requests:
    """Cuts requests out of a corpus, by the tokenizer of the measured model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._corpus: list[int] = tokenizer.encode("\n\n".join(file.read_text(encoding="utf-8") for file in _CORPUS)).ids

    def ragged(self, count: int) -> list[Request]:
        """Prompts of 16 to 512 and answers of 16 to 256 tokens."""
        draw = random.Random(_SEED)
        return [self.cut(draw.randrange(2000), draw.randint(16, 512), draw.randint(16, 256)) for _ in range(count)]

    def cut(self, start: int, length: int, max_tokens: int) -> Request:
        """The first text from token `start` on with exactly `length` tokens: a cut may change how text is tokenized."""
        corpus = self._corpus * (1 + (start + 2 * length) // len(self._corpus))
        for first in range(start, start + length):
            text = self._tokenizer.decode(corpus[first : first + length], skip_special_tokens=False)
            token_ids = self._tokenizer.encode(text).ids
            if len(token_ids) == length:
                return Request(text, tuple(token_ids), max_tokens)
        raise ValueError(f"no text of {length} tokens from token {start} on: take another corpus")
