"""Encoding of long texts: refused early if they cannot fit, and without blocking other threads."""

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


class RecordingTokenizer:
    """A tokenizer that records the length of each text that it encodes."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.characters: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **settings: Any) -> Any:
        self.characters += map(len, texts)
        return self._tokenizer.encode_batch_fast(texts, **settings)


def test_a_text_that_cannot_fit_is_refused_by_its_length() -> None:
    tokenizer = RecordingTokenizer()
    encoder = Encoder(tokenizer, CONTEXT)  # type: ignore[arg-type]
    assert encoder.max_characters == CONTEXT * LONGEST
    with pytest.raises(InvalidRequest, match=f"{CONTEXT} tokens. However, your text has 1000000 characters"):
        encoder.encode("7" * 1_000_000, add_special_tokens=True)
    assert tokenizer.characters == []


def test_encoding_stops_when_a_prefix_shows_that_the_text_cannot_fit() -> None:
    tokenizer = RecordingTokenizer()
    encoder = Encoder(tokenizer, CONTEXT)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"{CONTEXT * LONGEST} characters, of which the first {2 * CONTEXT} alone"):
        encoder.encode("7" * CONTEXT * LONGEST, add_special_tokens=True)
    assert tokenizer.characters == [2 * CONTEXT]


def test_a_text_that_fits_is_encoded_whatever_its_length() -> None:
    """Its tokens have many characters each."""
    tokenizer = byte_tokenizer()
    text = "<|im_start|>" * (CONTEXT - 1)
    found = Encoder(tokenizer, CONTEXT).encode(text, add_special_tokens=True)
    assert found == tokenizer.encode(text).ids
    assert len(found) == CONTEXT


def test_encoding_releases_the_interpreter_lock() -> None:
    """With a long switch interval, another thread runs only if the tokenizer releases the lock."""
    encoder = Encoder(byte_tokenizer(), 2**20)
    with _long_switch_interval(), _counting() as steps:
        before = len(steps)
        encoder.encode("1234567890" * 20_000, add_special_tokens=True)
        after = len(steps)
    assert after > before


@contextmanager
def _long_switch_interval() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def _counting() -> Iterator[list[None]]:
    """A list that grows with every step of another thread."""
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
