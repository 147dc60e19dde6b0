"""Texts of any length: refused by their length first, read without holding up anybody, and never further than the context."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from eventing.problems import InvalidRequest
from functions.gateway.text.encoder import Encoder
from tests.support.storage.published import byte_tokenizer

CONTEXT = 64
LONGEST = len("<|im_start|>")


class Noting:
    """The tokenizer, with the characters of each text that it was given."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.characters: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **settings: Any) -> Any:
        self.characters += map(len, texts)
        return self._tokenizer.encode_batch_fast(texts, **settings)


def test_a_text_that_cannot_fit_is_refused_by_its_length() -> None:
    tokenizer = Noting()
    encoder = Encoder(tokenizer, CONTEXT)  # type: ignore[arg-type]
    assert encoder.max_characters == CONTEXT * LONGEST
    with pytest.raises(InvalidRequest, match=f"1000000 characters; the model's context is {CONTEXT} tokens"):
        encoder.encode("7" * 1_000_000, add_special_tokens=True)
    assert tokenizer.characters == []


def test_no_more_is_read_of_a_text_than_shows_that_it_does_not_fit() -> None:
    tokenizer = Noting()
    encoder = Encoder(tokenizer, CONTEXT)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"the first {2 * CONTEXT} of the text's {CONTEXT * LONGEST} characters"):
        encoder.encode("7" * CONTEXT * LONGEST, add_special_tokens=True)
    assert tokenizer.characters == [2 * CONTEXT]


def test_what_fits_is_read_as_it_is_whatever_its_length() -> None:
    """Tokens of many characters: the text is far longer than it has tokens."""
    tokenizer = byte_tokenizer()
    text = "<|im_start|>" * (CONTEXT - 1)
    found = Encoder(tokenizer, CONTEXT).encode(text, add_special_tokens=True)
    assert found == tokenizer.encode(text).ids
    assert len(found) == CONTEXT


def test_others_go_on_while_a_text_is_read() -> None:
    """With switches at wish only, another thread takes steps only if the tokenizer lets go of the interpreter."""
    encoder = Encoder(byte_tokenizer(), 2**20)
    with _switching_at_wish(), _counting() as steps:
        before = len(steps)
        encoder.encode("1234567890" * 20_000, add_special_tokens=True)
        after = len(steps)
    assert after > before


@contextmanager
def _switching_at_wish() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def _counting() -> Iterator[list[None]]:
    """Grows with every step of another thread."""
    steps: list[None] = []
    over = False

    def count() -> None:
        while not over:
            steps.append(None)
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield steps
    finally:
        over = True
        thread.join()
