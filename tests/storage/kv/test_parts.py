"""Blocks grouped into parts: aligned, without gaps, and found by a chain with the same beginning."""

from collections import deque
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from storage.kv.parts import PART_BYTES, KVPart, most_blocks, parts_between

MOSTS = st.sampled_from([1, 2, 4, 8, 64])


@given(st.integers(0, 300), st.integers(0, 300), MOSTS)
def test_parts_are_aligned_powers_of_two_without_gaps(first: int, end: int, most: int) -> None:
    parts = list(parts_between(first, end, most))
    assert all(part.first % part.count == 0 and part.count & (part.count - 1) == 0 for part in parts)
    assert all(part.count <= most for part in parts)
    assert all(one.end == other.first for one, other in pairwise(parts))
    if first < end:
        assert parts[0].first <= first < parts[0].end
        assert parts[-1].end == end
    else:
        assert not parts


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), MOSTS)
def test_a_longer_chain_finds_all_parts_of_its_beginning(first: int, written: int, beyond: int, most: int) -> None:
    there = set(parts_between(0, written, most))
    wanted = deque(parts_between(first, written + beyond, most))
    held = first
    while wanted:
        part = wanted.popleft()
        if part in there:
            held = max(held, part.end)
        else:
            wanted = deque(part.halves())
    assert held == max(first, written)


def test_parts_have_a_few_megabytes() -> None:
    assert most_blocks(491_520) == 8
    assert most_blocks(PART_BYTES) == 1
    assert most_blocks(100 * PART_BYTES) == 1
    assert most_blocks(1) == 64


def test_a_single_block_has_no_halves() -> None:
    assert KVPart(8, 4).halves() == (KVPart(8, 2), KVPart(10, 2))
    assert KVPart(8, 1).halves() == ()
