"""The KV arena: all free memory can be reserved, ranges never overlap, and bytes are as planned."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from functions.stage.models import kv_cache
from functions.stage.models.layer_group import KVCacheFull
from functions.stage.models.llama.kv_pool import TorchKVPool

TOKEN_BYTES = 3 * 2 * 2 * 4 * 4


def pool(tokens: int) -> TorchKVPool:
    return TorchKVPool(3, 2, 4, torch.float32, torch.device("cpu"), tokens * TOKEN_BYTES + TOKEN_BYTES - 1)


def fill(kv: TorchKVPool, handle: int, first: int, last: int, value: float) -> None:
    slots = kv.slots([(handle, first, last)])
    for layer in range(3):
        kv.write(layer, slots, torch.full((last - first, 2, 2, 4), value + layer))
    kv.extend(handle, last - first)


def assert_holds(kv: TorchKVPool, handle: int, value: float) -> None:
    for layer, (keys, values) in enumerate(kv.read(handle, 0, kv.length(handle))):
        assert keys.shape == values.shape == (2, 1, kv.length(handle), 4)
        assert keys.eq(value + layer).all()
        assert values.eq(value + layer).all()


def fragmented(filled: int) -> tuple[TorchKVPool, int, int]:
    """A pool of 100 tokens with three holes of 20, and the handles between them. They hold 10.0 and 30.0 `filled` times."""
    kv = pool(100)
    handles = [kv.reserve(20) for _ in range(5)]
    for number, handle in enumerate(handles):
        fill(kv, handle, 0, filled, 10.0 * number)
    for number in (0, 2, 4):
        kv.release(handles[number])
    return kv, handles[1], handles[3]


def test_capacity_is_the_budget_to_the_token() -> None:
    kv = pool(100)
    assert (kv.capacity_tokens, kv.free_tokens, kv.bytes_per_token) == (100, 100, TOKEN_BYTES)
    handle = kv.reserve(37)
    assert (kv.free_tokens, kv.reserved(handle), kv.length(handle)) == (63, 37, 0)
    kv.release(handle)
    assert kv.free_tokens == 100
    with pytest.raises(ValueError, match="holds no token"):
        pool(0)


def test_a_refused_reservation_reports_free_tokens() -> None:
    kv = pool(100)
    kv.reserve(40)
    with pytest.raises(KVCacheFull, match="61 tokens wanted, 60 free"):
        kv.reserve(61)


def test_a_reservation_larger_than_every_hole_compacts_the_arena() -> None:
    kv, first, second = fragmented(filled=15)
    large = kv.reserve(60)
    fill(kv, large, 0, 60, 100.0)
    for handle, value in ((first, 10.0), (second, 30.0), (large, 100.0)):
        assert_holds(kv, handle, value)
    assert kv.free_tokens == 0


class _CopiesFail(TorchDispatchMode):
    """All copies after the first `last` fail, as a GPU's do after an error."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left = last

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default or func is torch.ops.aten.clone.default:
            if self.left == 0:
                raise RuntimeError("no memory")
            self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("copies", range(24))
def test_a_failed_compaction_leaves_no_wrong_keys_and_values(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_MOVED_AT_ONCE", 5 * 2 * 2 * 4 * 4)
    kv, first, second = fragmented(filled=10)
    with pytest.raises(RuntimeError, match="no memory"), _CopiesFail(copies):
        kv.reserve(60)
    assert kv.free_tokens == 60, "the reservation that failed is not there"
    assert [kv.length(handle) for handle in (first, second)].count(10) == 1
    assert_holds(kv, first, 10.0)
    assert_holds(kv, second, 30.0)
    large = kv.reserve(60)
    for handle, tokens, value in ((large, 60, 100.0), (first, 20, 10.0), (second, 20, 30.0)):
        fill(kv, handle, kv.length(handle), tokens, value)
    for handle, value in ((large, 100.0), (first, 10.0), (second, 30.0)):
        assert_holds(kv, handle, value)


def test_compaction_allocates_all_memory_before_it_moves_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = pool(100)
    first, second = kv.reserve(30), kv.reserve(30)
    fill(kv, second, 0, 30, 7.0)
    kv.release(first)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(MemoryError):
        kv.reserve(60)
    assert (kv.length(second), kv.free_tokens) == (30, 70)
    assert_holds(kv, second, 7.0)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_keep_their_tokens_through_any_reservations_and_releases(seed: int) -> None:
    chance = random.Random(seed)
    kv = pool(500)
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
        assert kv.free_tokens == 500 - sum(kv.reserved(handle) for handle in held)
    for handle, value in held.items():
        assert_holds(kv, handle, value)


def test_a_thousand_sequences_leave_nothing_behind() -> None:
    kv = pool(50)
    handles = set()
    for _ in range(1000):
        handle = kv.reserve(50)
        handles.add(handle)
        kv.release(handle)
    assert kv.free_tokens == 50
    assert handles == {0}, "handles are used again"
