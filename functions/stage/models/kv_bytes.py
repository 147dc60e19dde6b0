"""The byte format of KV: how keys and values of a range of tokens are sent between pods and kept in the store.

    header   96 bytes, little-endian: magic "LMKV", version, layout, first token, tokens, BLAKE3 of the payload
    payload  [num_layers, 2, kv_heads, tokens, head_bytes], as in the KV arena of the sender

A payload is used only after its digest, and the header against the receiver's arena, have been checked. The bytes do not name
the model and its layers: the request for them does (`stage/kv`).
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from blake3 import blake3

from functions.stage.models.kv_cache import KVLayout, KVRanges

VERSION: Final = 1
_MAGIC: Final = b"LMKV"
_HEADER: Final = struct.Struct("<4sI32sIIIIII32s")
HEADER_BYTES: Final = _HEADER.size
_DIGEST_BYTES: Final = 32


class ForeignKV(ValueError):
    """The bytes do not fit this arena: their layout, version or position differs.

    Another model, dtype, CPU or release wrote them.
    """


class AlteredKV(ValueError):
    """The bytes are not those that were written: they are truncated, or their digest differs."""


@dataclass(frozen=True, slots=True)
class CheckedKV:
    """KV of tokens [first, end), whose header and digest have been verified."""

    first: int
    end: int
    payload: memoryview


def copied_kv(pool: KVRanges, handle: int, first: int, end: int) -> bytearray:
    """Copies the KV of a sequence's tokens [first, end) into bytes of this format, except for the digest.

    `stamp` adds the digest; it takes longest and, unlike this, needs no access to the arena, so any thread may do it.
    first: must begin a block. Raises ValueError if it does not, or the sequence does not hold the tokens.
    """
    layout = pool.layout
    if not 0 <= first < end <= pool.length(handle) or first % layout.block_tokens:
        raise ValueError(f"tokens {first} to {end} of a sequence that holds {pool.length(handle)}")
    rows = layout.rounded(end) - first
    data = bytearray(HEADER_BYTES + rows * layout.token_bytes)
    payload = np.frombuffer(memoryview(data)[HEADER_BYTES:], np.uint8)
    pool.copy_out(pool.start(handle) + first, payload.reshape(_shape(layout, rows)))
    _HEADER.pack_into(data, 0, *_head(layout), first, end - first, bytes(_DIGEST_BYTES))
    return data


def stamp(data: bytearray) -> None:
    """Writes the payload's digest into the header of what `copied_kv` returned."""
    data[HEADER_BYTES - _DIGEST_BYTES : HEADER_BYTES] = blake3(memoryview(data)[HEADER_BYTES:]).digest()


def put_kv(pool: KVRanges, handle: int, found: CheckedKV) -> int:
    """Writes to the arena those tokens of `found` that the sequence lacks. Returns how many the sequence holds then.

    found: checked against the pool's layout. Raises ValueError if the sequence lacks tokens before `found`, or has too little
    memory reserved.
    """
    first, end = found.first, found.end
    held = pool.length(handle)
    if held >= end:
        return held
    layout = pool.layout
    if held < first or held % layout.block_tokens or end > pool.reserved(handle):
        reserved = pool.reserved(handle)
        raise ValueError(f"tokens {first} to {end} for a sequence that holds {held} and has {reserved} reserved")
    rows = layout.rounded(end) - first
    arrays = np.frombuffer(found.payload, np.uint8).reshape(_shape(layout, rows))
    pool.copy_in(pool.start(handle) + held, arrays[:, :, :, held - first :])
    pool.extend(handle, end - held)
    return end


def checked(layout: KVLayout, data: bytes | bytearray | memoryview) -> CheckedKV:
    """Verifies the header of KV bytes against a layout, and the digest. Raises ForeignKV or AlteredKV."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise AlteredKV(f"{len(view)} bytes, fewer than a header has")
    *head, first, tokens, digest = _HEADER.unpack_from(view)
    if tuple(head) != _head(layout):
        raise ForeignKV(f"the header says {_described(tuple(head))}; here it is {_described(_head(layout))}")
    if tokens < 1 or first % layout.block_tokens:
        raise ForeignKV(f"{tokens} tokens from {first} on; blocks have {layout.block_tokens}")
    payload = view[HEADER_BYTES:]
    wanted = (layout.rounded(first + tokens) - first) * layout.token_bytes
    if len(payload) != wanted:
        raise AlteredKV(f"{len(payload)} bytes for {tokens} tokens, which take {wanted}")
    if blake3(payload).digest() != digest:
        raise AlteredKV(f"the digest of {len(payload)} bytes is not the one that was written with them")
    return CheckedKV(first, first + tokens, payload)


def _head(layout: KVLayout) -> tuple[object, ...]:
    kind = layout.kind.encode().ljust(32, b"\0")
    return _MAGIC, VERSION, kind, layout.num_layers, layout.kv_heads, layout.head_bytes, layout.block_tokens


def _described(head: tuple[object, ...]) -> str:
    magic, version, kind, layers, heads, head_bytes, block = head
    named = kind.rstrip(b"\0").decode(errors="replace") if isinstance(kind, bytes) else kind
    return f"{magic!r} version {version}, {named!r}, {layers} layers of {heads} heads of {head_bytes} bytes, blocks of {block}"


def _shape(layout: KVLayout, rows: int) -> tuple[int, int, int, int, int]:
    return layout.num_layers, 2, layout.kv_heads, rows, layout.head_bytes
