"""Page-aligned memory for weights and for keys and values."""

import ctypes
import functools
import mmap
import sys
import threading
import time
import weakref
from typing import Final

_MADV_POPULATE_WRITE: Final = 23  # madvise(2), Linux 5.14
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_HUGE_PAGE_BYTES: Final = 2 * 2**20  # of x86-64, and of arm64 with pages of 4 KiB
_LEAST_RESIDENT: Final = 0.75  # of a huge page: moving the rest of it into RAM costs memory
_MINCORE_STEP_BYTES: Final = 2**30

_mappings: Final = weakref.WeakSet[mmap.mmap]()  # that `new_memory` gave and that are in use
_lock: Final = threading.Lock()  # of `_mappings`: one that grows cannot be listed


def new_memory(size: int) -> memoryview:
    """Allocates `size` bytes: writable, page-aligned and zero. The kernel allocates a page when it is first used."""
    # Without MADV_HUGEPAGE: measured, finding whole huge pages took a loaded machine two to three times as long to fill.
    # mmap(2) maps no empty piece.
    mapping = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with _lock:
        _mappings.add(mapping)
    return memoryview(mapping)[:size]


def use_huge_pages() -> int:
    """Moves memory from `new_memory` into huge pages of 2 MiB. Returns how many bytes are in huge pages.

    Leaves a range of 2 MiB as it is if less than three quarters of it are in RAM. Each takes 0.3 to 8 ms of processor time, and
    the thread sleeps as long afterwards. Other threads may use the memory meanwhile. Does nothing before Linux 6.1.
    """
    if (libc := _libc()) is None:
        return 0
    with _lock:
        in_use = [memoryview(mapping) for mapping in _mappings]  # keeps them mapped
    in_huge_pages = 0
    for address in _huge_pages_of(in_use):
        started = time.perf_counter()
        is_dense = resident_bytes(address, _HUGE_PAGE_BYTES) >= _LEAST_RESIDENT * _HUGE_PAGE_BYTES
        if is_dense and libc.madvise(address, _HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0:
            in_huge_pages += _HUGE_PAGE_BYTES
        time.sleep(time.perf_counter() - started)
    return in_huge_pages


def _huge_pages_of(mappings: list[memoryview]) -> list[int]:
    """Returns the addresses of the ranges, each the size of a huge page, that mappings fill from end to end.

    A range may span mappings side by side, which the kernel joins.
    """
    pieces = sorted((address_of(memory), address_of(memory) + len(memory)) for memory in mappings)
    addresses, end_of_piece, first = [], 0, 0
    for start, end in pieces:
        if start != end_of_piece:
            first = start
        end_of_piece = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        first = -(-first // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        while first + _HUGE_PAGE_BYTES <= end_of_piece:
            addresses.append(first)
            first += _HUGE_PAGE_BYTES
    return addresses


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
