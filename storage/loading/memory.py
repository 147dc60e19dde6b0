"""Page-aligned memory for weights and for keys and values."""

import ctypes
import functools
import mmap
import sys
from typing import Final

_MADV_POPULATE_WRITE: Final = 23  # madvise(2), Linux 5.14
_MINCORE_STEP_BYTES: Final = 2**30


def new_memory(size: int) -> memoryview:
    """Allocates `size` bytes: writable, page-aligned and zero. The kernel allocates a page when it is first used."""
    # Without MADV_HUGEPAGE: measured, finding whole huge pages took a loaded machine two to three times as long to fill.
    # mmap(2) maps no empty piece.
    return memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]


def populate(part: memoryview) -> None:
    """Makes the kernel allocate all pages of a page-aligned part of memory at once. Does nothing if the kernel cannot.

    A read into allocated pages is a tenth faster than one that faults them in one by one.
    """
    # libc's madvise releases the interpreter's lock; `mmap.madvise` holds it, and all threads wait.
    if (libc := _libc()) is not None:
        libc.madvise(address_of(part), len(part), _MADV_POPULATE_WRITE)


def address_of(memory: memoryview) -> int:
    """The address of the first byte of writable memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def drop_pages(address: int, size: int) -> None:
    """Frees the whole pages within a private mapping of a file to which nothing was written.

    Later uses read the file again.
    """
    first, last = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and (libc := _libc()) is not None:
        libc.madvise(first, last - first, mmap.MADV_DONTNEED)


def resident_bytes(address: int, size: int) -> int:
    """How many of the `size` bytes at a page-aligned address are in RAM; 0 if unknown.

    Takes about a millisecond for each resident GiB.
    """
    if (libc := _libc()) is None:
        return 0
    pages = 0
    for done in range(0, size, _MINCORE_STEP_BYTES):
        count = -(-min(_MINCORE_STEP_BYTES, size - done) // mmap.PAGESIZE)
        seen = ctypes.create_string_buffer(count)
        if libc.mincore(address + done, count * mmap.PAGESIZE, seen) != 0:
            return 0
        pages += seen.raw.count(1)  # Linux leaves the other bits 0.
    return min(size, pages * mmap.PAGESIZE)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
