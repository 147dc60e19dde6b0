"""Memory that weights are read into, and keys and values are kept in."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Final

_MADV_POPULATE_WRITE: Final = 23  # madvise(2), Linux 5.14
_LOOKED_AT_ONCE_BYTES: Final = 2**30


def new_memory(size: int) -> memoryview:
    """Writable, at a page's boundary, zero pages until touched."""
    # Without MADV_HUGEPAGE: measured, finding whole huge pages took a loaded machine two to three times as long to fill.
    # mmap(2) maps no empty piece.
    return memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]


def populate(part: memoryview) -> None:
    """Has the kernel find the pages of a part of such memory, which must begin at a page's boundary, in one go.

    A read into pages that are there is a tenth faster than one that finds them one by one. Where the kernel cannot, nothing
    happens.
    """
    if (madvise := _madvise()) is not None:
        madvise(ctypes.addressof(ctypes.c_char.from_buffer(part)), len(part), _MADV_POPULATE_WRITE)


def resident_bytes(address: int, size: int) -> int:
    """How much of the memory at `address`, a page's boundary, has been touched and is in RAM; 0 where that is not known.

    Takes about a millisecond for each GiB that is there.
    """
    if (mincore := _mincore()) is None:
        return 0
    pages = 0
    for done in range(0, size, _LOOKED_AT_ONCE_BYTES):
        count = -(-min(_LOOKED_AT_ONCE_BYTES, size - done) // mmap.PAGESIZE)
        seen = ctypes.create_string_buffer(count)
        if mincore(address + done, count * mmap.PAGESIZE, seen) != 0:
            return 0
        pages += seen.raw.count(1)  # Linux leaves the other bits 0.
    return min(size, pages * mmap.PAGESIZE)


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int] | None:
    """mincore(2)."""
    if sys.platform != "linux":
        return None
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return mincore


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Of libc, which runs without the interpreter's lock; `mmap.madvise` keeps it, and everybody waits."""
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
