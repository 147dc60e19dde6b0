"""Page-aligned memory for weights and for keys and values."""

import ctypes
import functools
import mmap
import sys
import weakref
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


def freed_with_last_view(memory: memoryview) -> memoryview:
    """Returns a view of the same bytes, whose pages are freed when neither it nor a view of it is left.

    The rest of the mapping may live on. So nothing but this view may use these bytes from now on. memory: writable, a part of
    what `new_memory` or a private mapping of a file gave.
    """
    owner = (ctypes.c_char * len(memory)).from_buffer(memory)
    weakref.finalize(owner, drop_pages, ctypes.addressof(owner), len(memory)).atexit = False  # threads may still compute then
    return memoryview(owner).cast("B")


def drop_pages(address: int, size: int) -> None:
    """Frees the whole pages within private memory. Later uses find what the mapped file has, or zeros if there is no file."""
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
