"""Groups the blocks of a prefix chain into parts with predictable names, so that reading needs no listing.

A part is an aligned run of 1, 2, 4 … blocks, up to a few MB. With at most 8 blocks in a part, the blocks [0, 13) are 8 + 4 + 1.
A reader with a longer chain finds no part of 8 at block 8 and asks for its halves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

PART_BYTES: Final = 2**22
_MAX_BLOCKS: Final = 64


@dataclass(frozen=True, slots=True, order=True)
class KVPart:
    """Blocks [first, first + count): `count` is a power of two and `first` a multiple of it."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def halves(self) -> tuple["KVPart", ...]:
        """The two parts that this one consists of; empty for a single block."""
        half = self.count // 2
        return (KVPart(self.first, half), KVPart(self.first + half, half)) if half else ()


def most_blocks(block_bytes: int) -> int:
    """The most blocks that a part may have: a power of two, at most 64, with no more than PART_BYTES unless it is 1."""
    most = 1
    while most < _MAX_BLOCKS and 2 * most * block_bytes <= PART_BYTES:
        most *= 2
    return most


def parts_between(first: int, end: int, most: int) -> Iterator[KVPart]:
    """Yields the parts that hold the blocks [first, end), as large as possible and in order; the first may begin before
    `first`.

    most: highest number of blocks in a part, a power of two. All parts begin at multiples of it, so that readers agree.
    """
    at = first // most * most
    while at < end:
        count = most
        while at + count > end:
            count //= 2
        part = KVPart(at, count)
        if part.end > first:
            yield part
        at = part.end
