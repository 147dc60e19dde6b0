"""How the blocks of a conversation are grouped into parts, so that whoever knows its chain knows their names without a listing.

A part is an aligned run of 1, 2, 4 … blocks, at most as many as make a few MB. The blocks [0, 13) with at most 8 in a part are
8 + 4 + 1. Somebody whose chain goes on behind them finds no part of 8 at block 8 and asks for its halves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

PART_BYTES: Final = 2**22
_MOST_BLOCKS: Final = 64


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Blocks [first, end); `first` is a multiple of their number, a power of two."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def halves(self) -> tuple["Part", ...]:
        """None of a single block."""
        half = self.count // 2
        return (Part(self.first, half), Part(self.first + half, half)) if half else ()


def most_blocks(block_bytes: int) -> int:
    """In a part of about PART_BYTES: a power of two."""
    most = 1
    while most < _MOST_BLOCKS and 2 * most * block_bytes <= PART_BYTES:
        most *= 2
    return most


def parts_between(first: int, end: int, most: int) -> Iterator[Part]:
    """Parts that hold the blocks [first, end), in order, the largest that there may be; the first may begin before `first`.

    most: blocks in a part, a power of two. Begins at a multiple of it, so that all who want these blocks ask for the same.
    """
    at = first // most * most
    while at < end:
        count = most
        while at + count > end:
            count //= 2
        part = Part(at, count)
        if part.end > first:
            yield part
        at = part.end
