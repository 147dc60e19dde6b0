"""Keys and values as bytes: the same bits after a round trip in any dtype. Other bytes are refused before they are used."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.stage.models import kv_bytes
from functions.stage.models.kv_bytes import HEADER_BYTES, AlteredKV, ForeignKV, checked, copied_kv, put_kv, stamp
from functions.stage.models.kv_cache import KVBlocks
from functions.stage.models.layer_group import LayerGroup, Segment
from tests.support.functions.native_models import native_groups, torch_groups

CUT = ((0, 2),)


KINDS = [*(("native", dtype) for dtype in ("float32", "bfloat16", "int8", "q4")), ("torch", "float32"), ("torch", "bfloat16")]


@cache
def group(kind: str, dtype: str) -> LayerGroup:
    return native_groups("llama", dtype, CUT)[0] if kind == "native" else torch_groups("llama", dtype)[0]


def pool(of: LayerGroup) -> KVBlocks:
    assert isinstance(of.kv, KVBlocks)
    return of.kv


def read_kv(pool: KVBlocks, handle: int, first: int, end: int) -> bytearray:
    data = copied_kv(pool, handle, first, end)
    stamp(data)
    return data


def write_kv(pool: KVBlocks, handle: int, data: bytes | bytearray) -> int:
    return put_kv(pool, handle, checked(pool.layout, data))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_restored_keys_and_values_continue_with_the_same_bits(kind: str, dtype: str, data: st.DataObject) -> None:
    of = group(kind, dtype)
    length = data.draw(st.integers(2, 90))
    held = data.draw(st.integers(1, length - 1))
    first = data.draw(st.integers(0, held - 1)) // 16 * 16
    tokens = np.random.default_rng(length).integers(0, of.vocab_size, length)
    aside = of.kv.reserve(data.draw(st.integers(1, 40)))
    source, target = of.kv.reserve(length), of.kv.reserve(length)
    try:
        of.forward(tokens[:held], [Segment(source, 0, held)])
        parts = [read_kv(pool(of), source, 0, first)] if first else []
        parts.append(read_kv(pool(of), source, first, held))
        of.kv.release(aside)  # the target may move, what was read stays
        aside = of.kv.reserve(1)
        assert [write_kv(pool(of), target, part) for part in parts][-1] == held == of.kv.length(target)
        one, other = (of.forward(tokens[held:], [Segment(handle, held, length - held)]) for handle in (source, target))
        assert np.array_equal(one, other)
        assert read_kv(pool(of), source, 0, held) == read_kv(pool(of), target, 0, held)
    finally:
        for handle in (aside, source, target):
            of.kv.release(handle)


def _filled(of: LayerGroup, tokens: int = 48) -> int:
    handle = of.kv.reserve(tokens)
    of.forward(np.arange(tokens) % of.vocab_size, [Segment(handle, 0, tokens)])
    return handle


def test_held_tokens_are_not_overwritten() -> None:
    of = group("native", "float32")
    source, target = _filled(of), of.kv.reserve(64)
    of.forward(np.arange(16) + 5, [Segment(target, 0, 16)])
    own = read_kv(pool(of), target, 0, 16)
    assert write_kv(pool(of), target, read_kv(pool(of), source, 0, 48)) == 48
    assert read_kv(pool(of), target, 0, 16) == own
    assert read_kv(pool(of), target, 16, 48)[HEADER_BYTES:] == read_kv(pool(of), source, 16, 48)[HEADER_BYTES:]
    assert write_kv(pool(of), target, read_kv(pool(of), source, 0, 32)) == 48
    for handle in (source, target):
        of.kv.release(handle)


SPOILT: list[tuple[str, Callable[[bytearray], bytes], type[Exception]]] = [
    ("a bit of the payload", lambda data: data[:-1] + bytes([data[-1] ^ 1]), AlteredKV),
    (
        "a bit of the digest",
        lambda data: data[: HEADER_BYTES - 1] + bytes([data[HEADER_BYTES - 1] ^ 1]) + data[HEADER_BYTES:],
        AlteredKV,
    ),
    ("a byte too few", lambda data: data[:-1], AlteredKV),
    ("a byte too many", lambda data: data + b"\0", AlteredKV),
    ("no header", lambda data: data[:20], AlteredKV),
    ("nothing", lambda data: b"", AlteredKV),
    ("no KV at all", lambda data: b"PNG!" + data[4:], ForeignKV),
    ("another version", lambda data: data[:4] + b"\1\0\0\0" + data[8:], ForeignKV),
    ("more tokens than there are", lambda data: data[:72] + b"\xff\xff\xff\xff" + data[76:], AlteredKV),
    ("no tokens", lambda data: data[:72] + bytes(4) + data[76:], ForeignKV),
    ("inside a block", lambda data: data[:68] + b"\1\0\0\0" + data[72:], ForeignKV),
]


@pytest.mark.parametrize(("spoil", "error"), [row[1:] for row in SPOILT], ids=[row[0] for row in SPOILT])
def test_damaged_bytes_are_refused_and_nothing_is_written(spoil: Callable[[bytearray], bytes], error: type[Exception]) -> None:
    of = group("native", "bfloat16")
    source, target = _filled(of), of.kv.reserve(48)
    good = read_kv(pool(of), source, 0, 48)
    with pytest.raises(error):
        write_kv(pool(of), target, spoil(good))
    assert of.kv.length(target) == 0
    assert write_kv(pool(of), target, good) == 48
    for handle in (source, target):
        of.kv.release(handle)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("native", "int8"), ("native", "float32"), ("native", "bfloat16/int8"), ("torch", "bfloat16")]
)
def test_keys_and_values_of_another_dtype_or_kind_are_refused(kind: str, dtype: str) -> None:
    of, other = group("native", "bfloat16"), group(kind, dtype)
    source, target = _filled(of), other.kv.reserve(48)
    with pytest.raises(ForeignKV, match=f"'{pool(other).layout.kind}' is"):
        write_kv(pool(other), target, read_kv(pool(of), source, 0, 48))
    of.kv.release(source)
    other.kv.release(target)


def test_gaps_and_tokens_beyond_the_reservation_are_refused() -> None:
    of = group("native", "float32")
    source, short, empty = _filled(of), of.kv.reserve(32), of.kv.reserve(48)
    with pytest.raises(ValueError, match="has 32 reserved"):
        write_kv(pool(of), short, read_kv(pool(of), source, 0, 48))
    with pytest.raises(ValueError, match="holds 0"):
        write_kv(pool(of), empty, read_kv(pool(of), source, 16, 48))
    with pytest.raises(ValueError, match="holds 48"):
        read_kv(pool(of), source, 16, 49)
    assert of.kv.length(short) == of.kv.length(empty) == 0
    for handle in (source, short, empty):
        of.kv.release(handle)


def test_kinds_that_differ_only_at_their_end_are_told_apart() -> None:
    """They were cut off at 32 bytes."""
    of = group("native", "float32")
    source, target = _filled(of), of.kv.reserve(48)
    data = read_kv(pool(of), source, 0, 48)
    long = "native bfloat16 avx512_bf16 and whatever else the bits depend on"
    kinds = [replace(pool(of).layout, kind=f"{long}, {end}") for end in ("int8 KV", "bf16 KV")]
    heads = [kv_bytes._HEADER.pack(*kv_bytes._head(kind), *kv_bytes._HEADER.unpack_from(data)[-5:]) for kind in kinds]
    assert checked(kinds[0], heads[0] + data[HEADER_BYTES:]).end == 48
    with pytest.raises(ForeignKV, match="bf16 KV"):
        checked(kinds[1], heads[0] + data[HEADER_BYTES:])
    for handle in (source, target):
        of.kv.release(handle)
