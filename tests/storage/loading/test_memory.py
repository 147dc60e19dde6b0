"""Resident memory as the kernel counts it, and parts of a mapping that are freed one by one."""

import ctypes
import mmap
from pathlib import Path

import pytest

from storage.loading.memory import address_of, freed_with_last_view, new_memory, resident_bytes, use_huge_pages


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


def test_pages_are_freed_when_the_last_view_of_them_is_gone() -> None:
    page = mmap.PAGESIZE
    memory = new_memory(8 * page)
    memory[:] = bytes([7]) * len(memory)
    address = address_of(memory)
    first, second = freed_with_last_view(memory[: 3 * page + 64]), freed_with_last_view(memory[3 * page + 64 :])
    view = first[page + 1 : page + 2].cast("b")
    del first
    assert resident_bytes(address, 8 * page) == 8 * page
    assert view[0] == 7
    del view
    assert resident_bytes(address, 8 * page) == 5 * page, "the page that both have stays"
    assert bytes(second) == bytes([7]) * len(second)
    del second
    assert resident_bytes(address, 8 * page) == page


def test_a_view_keeps_its_mapping() -> None:
    view = freed_with_last_view(new_memory(mmap.PAGESIZE)[100:200])
    view[:] = bytes(range(100))
    assert bytes(view) == bytes(range(100))
    assert len(freed_with_last_view(new_memory(0))) == 0


def _has_huge_pages() -> bool:
    release = Path("/proc/sys/kernel/osrelease")
    numbers = release.read_text().split(".")[:2] if release.exists() else ["0", "0"]
    return tuple(map(int, numbers)) >= (6, 1) and Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.skipif(not _has_huge_pages(), reason="MADV_COLLAPSE takes Linux 6.1 with transparent huge pages")
def test_only_memory_that_is_in_ram_moves_into_huge_pages() -> None:
    huge = 2 * 2**20
    sparse, full = new_memory(8 * huge), new_memory(3 * huge)
    sparse[: huge // 2] = bytes([1]) * (huge // 2)
    full[:] = bytes(range(256)) * (len(full) // 256)
    before = resident_bytes(address_of(sparse), len(sparse))
    moved = use_huge_pages()
    assert moved >= 2 * huge, "three huge pages have two between their ends, wherever they begin"
    assert resident_bytes(address_of(sparse), len(sparse)) <= before + huge, "one may begin in it and end in the other"
    assert full == bytes(range(256)) * (len(full) // 256)
    assert sparse[: huge // 2] == bytes([1]) * (huge // 2)
    assert not any(sparse[huge // 2 :])


def test_memory_that_is_gone_is_not_moved() -> None:
    memory = new_memory(2**22)
    memory[:] = bytes(2**22)
    del memory
    left = new_memory(100)
    left[:] = bytes(range(100))
    use_huge_pages()
    assert left == bytes(range(100))
