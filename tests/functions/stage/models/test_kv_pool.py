"""The KV arena: all free memory can be reserved, blocks never overlap, nothing moves, and bytes are as planned."""

import random

import numpy as np
import pytest
import torch

from functions.stage.models.kv_cache import GOING_BACK, KVBudget, KVCacheFull, KVNeed
from functions.stage.models.llama.kv_pool import TorchKVPool
from functions.stage.models.native.kv_pool import LayerKV, NativeKVPool
from functions.stage.native.records import PAGE_TOKENS, Dtype

BLOCK = 16
BLOCK_BYTES = BLOCK * 3 * 2 * 2 * 4 * 4


def pool(blocks: int) -> TorchKVPool:
    return TorchKVPool(3, 2, 4, torch.float32, torch.device("cpu"), blocks * BLOCK_BYTES + BLOCK_BYTES - 1)


def fill(kv: TorchKVPool, handle: int, first: int, last: int, value: float) -> None:
    slots = kv.slots([(handle, first, last)])
    for layer in range(3):
        kv.write(layer, slots, torch.full((last - first, 2, 2, 4), value + layer))
    kv.extend(handle, last - first)


def assert_holds(kv: TorchKVPool, handle: int, value: float) -> None:
    read = kv.reader(handle, 0, kv.length(handle))
    for layer in range(3):
        keys, values = read(layer)
        assert keys.shape == values.shape == (2, 1, kv.length(handle), 4)
        assert keys.eq(value + layer).all()
        assert values.eq(value + layer).all()


def test_capacity_is_the_budget_in_whole_blocks() -> None:
    kv = pool(6)
    assert (kv.capacity_tokens, kv.free_tokens) == (6 * BLOCK, 6 * BLOCK)
    handle = kv.reserve(37)
    assert (kv.free_tokens, kv.reserved(handle), kv.length(handle)) == (3 * BLOCK, 37, 0)
    kv.release(handle)
    assert kv.free_tokens == 6 * BLOCK
    with pytest.raises(
        ValueError, match=f"a KV budget of {BLOCK_BYTES - 1} bytes holds no 16 tokens, which take {BLOCK_BYTES}"
    ):
        pool(0)


def test_a_refused_reservation_reports_free_tokens() -> None:
    kv = pool(6)
    kv.reserve(40)
    with pytest.raises(KVCacheFull, match="61 tokens wanted, 48 free"):
        kv.reserve(61)


def test_a_reservation_larger_than_every_hole_takes_blocks_here_and_there_and_moves_nothing() -> None:
    kv = pool(10)
    handles = [kv.reserve(2 * BLOCK) for _ in range(5)]
    for number, handle in enumerate(handles):
        fill(kv, handle, 0, 20, 10.0 * number)
    one, other = handles[1], handles[3]
    for handle in handles[::2]:
        kv.release(handle)
    tables = kv.tables[one].copy(), kv.tables[other].copy()
    large = kv.reserve(6 * BLOCK)
    fill(kv, large, 0, 6 * BLOCK, 100.0)
    for handle, value in ((one, 10.0), (other, 30.0), (large, 100.0)):
        assert_holds(kv, handle, value)
    assert kv.free_tokens == 0
    assert np.array_equal((kv.tables[one], kv.tables[other]), tables)


def test_a_reservation_takes_neighbours_where_there_are_enough() -> None:
    kv = pool(10)
    first, _ = kv.reserve(BLOCK), kv.reserve(2 * BLOCK)
    kv.release(first)
    assert kv.tables[kv.reserve(4 * BLOCK)].tolist() == [[3, 4, 5, 6]]
    assert kv.tables[kv.reserve(BLOCK)].tolist() == [[0]]


@pytest.mark.parametrize("windows", [(None,) * 4, (None, 100, 100, 700)])
def test_physical_memory_is_what_was_written_and_never_more_than_the_budget(windows: tuple[int | None, ...]) -> None:
    """Sequences of all lengths come and go, and are copied: what was released is used again."""
    budget, dice = 24 * 2**20, random.Random(1)
    layers = [LayerKV(window, 2, 64) for window in windows]
    kv = NativeKVPool(layers, Dtype.F32, budget)
    page_bytes = kv.arena.nbytes // len(kv.arena)
    held: list[int] = []
    for _ in range(300):
        tokens = dice.randrange(1, 3000)
        while held and kv.need.of(tokens) > kv.free_units:
            kv.release(held.pop(dice.randrange(len(held))))
        handle = kv.reserve(tokens)
        pages = kv.tables[handle]
        kv.arena[pages[pages >= 0]] = 1
        if held and kv.holds(held[-1], tokens):
            kv.copy(held[-1], handle, tokens)
        else:
            for first in range(0, tokens, GOING_BACK):
                kv.extend(handle, min(GOING_BACK, tokens - first))
        held.append(handle)
        assert kv.resident_bytes <= budget
    assert kv.free_units + sum(map(kv.units, held)) == budget // page_bytes
    fresh = NativeKVPool(layers, Dtype.F32, budget)
    fresh.arena[fresh.tables[fresh.reserve(PAGE_TOKENS)]] = 1
    assert fresh.resident_bytes == len(windows) * page_bytes


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_keys_and_values_in_8_bits_leave_memory_for_nearly_twice_the_tokens(head_dim: int) -> None:
    wide, narrow = (NativeKVPool([LayerKV(None, 2, head_dim)] * 4, dtype, 2**26) for dtype in (Dtype.BF16, Dtype.INT8))
    assert narrow.capacity_tokens > 1.85 * wide.capacity_tokens
    assert narrow.layout.token_bytes == 4 * 2 * 2 * (head_dim + 4)


@pytest.mark.parametrize(
    ("length", "back", "left"), [(300, 1, 1), (300, 300, 300), (400, 336, 336), (5000, 4760, 4760), (5000, 4759, 0)]
)
def test_a_sequence_with_windows_is_truncated_by_so_many_tokens_or_to_nothing(length: int, back: int, left: int) -> None:
    kv = KVBudget(100_000, KVNeed(1, 1, 320))
    handle = kv.reserve(6000)
    for first in range(0, length, 200):
        kv.extend(handle, min(200, length - first))
    assert kv.holds(handle, back) == (left > 0)
    kv.truncate(handle, back)
    assert kv.length(handle) == left
    kv.extend(handle, 5)
    assert kv.length(handle) == left + 5


@pytest.mark.parametrize("seed", range(3))
def test_sequences_keep_their_tokens_through_any_reservations_and_releases(seed: int) -> None:
    chance = random.Random(seed)
    kv = pool(40)
    held: dict[int, float] = {}
    for step in range(400):
        tokens = chance.choice([1, 3, 20, 60, 150])
        if tokens <= kv.free_tokens:
            handle = kv.reserve(tokens)
            assert handle not in held
            fill(kv, handle, 0, chance.randint(1, tokens), float(step))
            held[handle] = float(step)
        else:
            with pytest.raises(KVCacheFull):
                kv.reserve(tokens)
            kv.release(gone := chance.choice(list(held)))
            del held[gone]
        assert kv.free_tokens == 40 * BLOCK - sum(-(-kv.reserved(handle) // BLOCK) * BLOCK for handle in held)
    for handle, value in held.items():
        assert_holds(kv, handle, value)


def test_a_thousand_sequences_leave_nothing_behind() -> None:
    kv = pool(4)
    handles = set()
    for _ in range(1000):
        handle = kv.reserve(50)
        handles.add(handle)
        kv.release(handle)
    assert kv.free_tokens == 4 * BLOCK
    assert handles == {0}, "handles are used again"


def test_memory_of_recurrent_states_is_used_again_once_nothing_refers_to_them() -> None:
    pool = NativeKVPool([], Dtype.BF16, 2**20, state_values=1024)

    def computed(handle: int, tokens: int, number: float) -> None:
        begun = pool.begin_pass(handle, tokens, 0)
        assert begun is not None
        pool.extend(handle, tokens)
        begun.states[:], begun.copies[:] = number, number
        pool.end_pass(handle, 0)

    kept = pool.reserve(64)
    computed(kept, 16, 1.0)  # leaves a checkpoint
    for number in range(100):
        handle = pool.reserve(64)
        assert not pool._states[handle].any(), "a sequence begins with zeros"
        computed(handle, 16, 2.0 + number)
        pool.release(handle)
    computed(kept, 3, 200.0)
    pool.truncate(kept, 16)
    assert (pool._states[kept] == 1.0).all()
    assert 0 < len(pool._spare) <= 3, "what was released has served again"
