"""Draft tokens of what comes next: what stood behind the last tokens where they stood before (prompt lookup)."""

from array import array
from collections.abc import Sequence
from typing import Final

MATCH_TOKENS: Final = (2, 3, 4, 6, 8, 12, 16, 32)
"""Lengths of suffixes that are looked for. One token stands in too many places to say what comes behind it."""
LOOKED_AT_TOKENS: Final = 16_384
"""The latest ones, which takes some 10 µs; all of a long context would make every step of it slower."""
_TOKEN_BYTES: Final = 4


class Lookup:
    """The tokens of one sequence, prompt and answer, and a text that the client expects the answer to have.

    The longest suffix that stood anywhere before wins, the latest place of it. Four bytes for each token. Not thread-safe.
    """

    def __init__(self, token_ids: Sequence[int], predicted: Sequence[int] = ()) -> None:
        """token_ids: of the prompt. predicted: the tokens of the text that is expected."""
        self._predicted = _bytes(predicted[:LOOKED_AT_TOKENS])
        self._text = self._predicted + _bytes(token_ids)
        """One text, so that one search finds both."""
        self._expected = 0
        """How far into `predicted` the answer has come as long as it is just that: bytes."""

    def add(self, token: int) -> None:
        """It was drawn."""
        drawn = _bytes([token])
        if self._expected >= 0 and self._predicted.startswith(drawn, self._expected):
            self._expected += _TOKEN_BYTES
        else:
            self._expected = -1
        self._text += drawn

    def draft(self, most_tokens: int) -> tuple[tuple[int, ...], int]:
        """At most so many tokens, and how many tokens before them agreed; () and 0 where nothing is like the last tokens."""
        if 0 <= self._expected < len(self._predicted):
            agreed = self._expected // _TOKEN_BYTES
            return _tokens(self._predicted[self._expected :][: most_tokens * _TOKEN_BYTES]), max(MATCH_TOKENS[0], agreed)
        behind, match = self._longest()
        if not match:
            return (), 0
        size = most_tokens * _TOKEN_BYTES
        found = self._text[behind : behind + size]
        # What repeats itself has its last repetition at its end: it goes on as it began.
        return _tokens((found * -(-size // len(found)))[:size]), match

    def _longest(self) -> tuple[int, int]:
        """Where the latest occurrence of the longest suffix that occurs before ends, in bytes, and how many tokens it has."""
        best = (0, 0)
        first = max(0, len(self._text) - LOOKED_AT_TOKENS * _TOKEN_BYTES)
        for tokens in MATCH_TOKENS:
            size = tokens * _TOKEN_BYTES
            if len(self._text) <= size or (place := self._latest(self._text[-size:], first)) < 0:
                break
            best = (place + size, tokens)
        return best

    def _latest(self, suffix: bytearray, first: int) -> int:
        """Where it begins, behind `first` and before itself; -1: nowhere. Only where a token begins."""
        end = len(self._text) - 1
        while (place := self._text.rfind(suffix, first, end)) >= 0 and place % _TOKEN_BYTES:
            end = place + len(suffix) - 1
        return place


def _bytes(token_ids: Sequence[int]) -> bytearray:
    return bytearray(array("i", token_ids).tobytes())


def _tokens(data: bytearray) -> tuple[int, ...]:
    return tuple(memoryview(data).cast("i"))
