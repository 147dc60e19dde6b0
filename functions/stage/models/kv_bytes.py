"""The byte format in which the KV of a range of tokens is sent between pods and kept in the store.

    header   little-endian: magic "LMKV", version, BLAKE3 of the layout's kind, its sizes, first token, tokens,
             first token of layers with windows, whether there are recurrent states, BLAKE3 of the payload
    payload  [num_layers, 2, kv_heads, tokens, head_bytes] of layers without a window, then of those with one, as in the KV
             arena of the sender. Layers with a window keep the last tokens of a sequence only. Then the recurrent states after
             the last token, if the sender has them.

Before a payload is used, its digest is checked, and the header is compared with the receiver's arena. The bytes do not name the
model, its layers or the lineage. The request for the bytes names them (`stage/kv`).
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from blake3 import blake3

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVBlocks, KVLayout

VERSION: Final = 3
_MAGIC: Final = b"LMKV"
_HEADER: Final = struct.Struct("<4sI32sIIIIIIIIIII32s")
HEADER_BYTES: Final = _HEADER.size
_DIGEST_BYTES: Final = 32


class ForeignKV(ValueError):
    """The bytes do not fit this arena: their layout, version or position differs.

    A stage with another model, dtype, CPU or release wrote them.
    """


class AlteredKV(ValueError):
    """The bytes are not those that were written: they are truncated, or their digest differs."""


@dataclass(frozen=True, slots=True)
class CheckedKV:
    """KV of tokens [first, end), whose header and digest have been verified."""

    first: int
    end: int
    windowed_from: int  # layers with windows have KV of tokens from here on
    payload: memoryview
    states: memoryview  # the recurrent states after the last token; empty if the sender did not have them


def copied_kv(pool: KVBlocks, handle: int, first: int, end: int) -> bytearray:
    """Copies the KV of a sequence's tokens [first, end) into bytes of this format, without the digest.

    Call `stamp` to add the digest. That takes longer, but needs no access to the arena, so any thread may call it. Raises
    ValueError if `first` is not the beginning of a block, or if the sequence does not hold the tokens.
    """
    layout = pool.layout
    if not 0 <= first < end <= pool.length(handle) or first % layout.block_tokens:
        raise ValueError(f"tokens {first} to {end} of a sequence that holds {pool.length(handle)}")
    windowed_from = min(pool.windowed_from(handle, first), layout.rounded(end))
    states = pool.state_out(handle, end)
    kv_bytes = _kv_bytes(layout, first, end, windowed_from)
    data = bytearray(HEADER_BYTES + kv_bytes + len(states))
    data[HEADER_BYTES + kv_bytes :] = states
    _HEADER.pack_into(data, 0, *_head(layout), first, end - first, windowed_from, bool(states), b"")
    every, windowed = _arrays(layout, memoryview(data)[HEADER_BYTES : HEADER_BYTES + kv_bytes], first, end, windowed_from)
    pool.copy_out(handle, first, every)
    pool.copy_out(handle, windowed_from, windowed, windowed=True)
    return data


def stamp(data: bytearray) -> None:
    """Writes the payload's digest into the header of what `copied_kv` returned."""
    data[HEADER_BYTES - _DIGEST_BYTES : HEADER_BYTES] = blake3(memoryview(data)[HEADER_BYTES:]).digest()


def put_kv(pool: KVBlocks, handle: int, found: CheckedKV) -> int:
    """Writes the KV of tokens that the sequence lacks to the arena. Returns how many tokens have then been written.

    The sequence holds these tokens only when layers with windows and recurrent layers have their part too, which a later call
    may bring. found: KV that was checked against the layout of `pool`. Raises ValueError if the sequence lacks tokens before
    `found`, or has too little memory reserved.
    """
    first, end = found.first, found.end
    filled = pool.filled(handle)
    if filled >= end:
        return filled
    layout = pool.layout
    if filled < first or filled % layout.block_tokens or end > pool.reserved(handle):
        reserved = pool.reserved(handle)
        raise ValueError(f"tokens {first} to {end} for a sequence that holds {filled} and has {reserved} reserved")
    every, windowed = _arrays(layout, found.payload, first, end, found.windowed_from)
    pool.copy_in(handle, filled, every[:, :, :, filled - first :])
    windowed_from = max(filled, found.windowed_from)
    pool.copy_in(handle, windowed_from, windowed[:, :, :, windowed_from - found.windowed_from :], windowed=True)
    pool.restored(handle, end, windowed_from)
    if found.states:
        pool.state_in(handle, end, found.states)
    return end


def checked(layout: KVLayout, data: bytes | bytearray | memoryview) -> CheckedKV:
    """Verifies the digest of KV bytes, and that the header fits the layout. Raises ForeignKV or AlteredKV."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise AlteredKV(f"{len(view)} bytes, fewer than a header has")
    *head, first, tokens, windowed_from, has_states, digest = _HEADER.unpack_from(view)
    if tuple(head) != _head(layout):
        raise ForeignKV(f"the header says {_described(tuple(head))}; {layout.kind!r} is {_described(_head(layout))}")
    if tokens < 1 or first % layout.block_tokens:
        raise ForeignKV(f"{tokens} tokens from {first} on; blocks have {layout.block_tokens}")
    if windowed_from % layout.block_tokens or not first <= windowed_from <= layout.rounded(first + tokens):
        raise ForeignKV(f"layers with windows from token {windowed_from} on, for tokens {first} to {first + tokens}")
    payload = view[HEADER_BYTES:]
    kv_bytes = _kv_bytes(layout, first, first + tokens, windowed_from)
    wanted = kv_bytes + (layout.state_bytes if has_states else 0)
    if len(payload) != wanted:
        raise AlteredKV(f"{len(payload)} bytes for {tokens} tokens, which take {wanted}")
    if blake3(payload).digest() != digest:
        raise AlteredKV(f"the digest of {len(payload)} bytes is not the one that was written with them")
    return CheckedKV(first, first + tokens, windowed_from, payload[:kv_bytes], payload[kv_bytes:])


def _head(layout: KVLayout) -> tuple[object, ...]:
    sizes = layout.num_layers, layout.windowed_layers, layout.window, layout.kv_heads, layout.head_bytes, layout.block_tokens
    return _MAGIC, VERSION, blake3(layout.kind.encode()).digest(), *sizes, layout.state_bytes


def _described(head: tuple[object, ...]) -> str:
    magic, version, kind, layers, windowed, window, heads, head_bytes, block, state_bytes = head
    named = kind.hex()[:8] if isinstance(kind, bytes) else kind
    return (
        f"{magic!r} version {version}, kind {named}, {layers} layers and {windowed} with windows of {window}, "
        f"{heads} heads of {head_bytes} bytes, blocks of {block}, recurrent states of {state_bytes} bytes"
    )


def _kv_bytes(layout: KVLayout, first: int, end: int, windowed_from: int) -> int:
    rows, windowed_rows = layout.rounded(end) - first, layout.rounded(end) - windowed_from
    return (layout.num_layers * rows + layout.windowed_layers * windowed_rows) * layout.layer_bytes


def _arrays(layout: KVLayout, payload: memoryview, first: int, end: int, windowed_from: int) -> tuple[Array, Array]:
    """Returns two views of a payload: KV of layers without a window, and KV of layers with one.

    Their shapes are those that `KVBlocks.copy_out` takes.
    """
    rows, windowed_rows = layout.rounded(end) - first, layout.rounded(end) - windowed_from
    numbers = np.frombuffer(payload, np.uint8)
    split = layout.num_layers * rows * layout.layer_bytes
    return (
        numbers[:split].reshape(layout.num_layers, 2, layout.kv_heads, rows, layout.head_bytes),
        numbers[split:].reshape(layout.windowed_layers, 2, layout.kv_heads, windowed_rows, layout.head_bytes),
    )
