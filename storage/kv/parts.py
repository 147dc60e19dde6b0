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
        """Splits the part into two of half the size; empty for a part of one block."""
        half = self.count // 2
        return (KVPart(self.first, half), KVPart(self.first + half, half)) if half else ()


def most_blocks(block_bytes: int) -> int:
    """The largest number of blocks in a part: a power of two, at most 64.

    A part of several blocks has at most PART_BYTES. A part of one block may have more.
    """
    most = 1
    while most < _MAX_BLOCKS and 2 * most * block_bytes <= PART_BYTES:
        most *= 2
    return most


def parts_between(first: int, end: int, most: int) -> Iterator[KVPart]:
    """Yields the parts that contain the blocks [first, end), as large as possible and in order.

    The first part may begin before `first`. most: highest number of blocks in a part, a power of two. Parts of `most` blocks
    begin at multiples of `most`, so that readers and writers agree.
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
