"""Resident memory as the kernel counts it."""

import ctypes
import mmap

from storage.loading.memory import new_memory, resident_bytes


def test_touched_memory_is_resident() -> None:
    size = 3 * 2**20
    memory = new_memory(size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert resident_bytes(address, size) == 0
    memory[: 2**20] = bytes(2**20)
    memory[size - 1] = 1
    assert resident_bytes(address, size) == 2**20 + mmap.PAGESIZE


def test_resident_bytes_of_a_partial_page_are_at_most_its_size() -> None:
    memory = new_memory(mmap.PAGESIZE + 10)
    memory[mmap.PAGESIZE] = 1
    assert resident_bytes(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 10 + mmap.PAGESIZE) == mmap.PAGESIZE


def test_memory_of_many_pages_is_counted_in_parts() -> None:
    size = 2**31 + mmap.PAGESIZE
    memory = new_memory(size)
    memory[size - 1] = 1
    memory[0] = 1
    assert resident_bytes(ctypes.addressof(ctypes.c_char.from_buffer(memory)), size) == 2 * mmap.PAGESIZE
