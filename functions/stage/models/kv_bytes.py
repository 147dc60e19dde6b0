"""Keys and values of a range of a sequence's tokens ↔ bytes: what goes from pod to pod, and into the store.

    header   96 bytes, little-endian: magic "LMKV", version, layout, first token, tokens, BLAKE3 of the payload
    payload  [num_layers, 2, kv_heads, tokens, head_bytes], as the arena has them

Nothing of a payload is touched before the header and the digest agree with the arena that it is for. Which model and which
layers they are of is not said here: who asks for bytes names that (`stage/kv`).
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
    """Bytes of another layout, version or place in the sequence: another model, dtype, CPU or release wrote them."""


class AlteredKV(ValueError):
    """Bytes that are not those that were written: truncated, or their digest is another."""


@dataclass(frozen=True, slots=True)
class CheckedKV:
    """Tokens [first, end), whose bytes are those that were written."""

    first: int
    end: int
    payload: memoryview


def read_kv(pool: KVRanges, handle: int, first: int, end: int) -> bytearray:
    """Tokens [first, end) of a sequence that holds them; `first` begins a block. A copy.

    Raises ValueError for a range that is not held.
    """
    data = copied_kv(pool, handle, first, end)
    stamp(data)
    return data


def copied_kv(pool: KVRanges, handle: int, first: int, end: int) -> bytearray:
    """As `read_kv`, but for the digest, which `stamp` adds: what takes longest is for any thread."""
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
    """Puts the payload's digest into the header."""
    data[HEADER_BYTES - _DIGEST_BYTES : HEADER_BYTES] = blake3(memoryview(data)[HEADER_BYTES:]).digest()


def write_kv(pool: KVRanges, handle: int, data: bytes | bytearray | memoryview) -> int:
    """Puts what of `data` lies behind the tokens that the sequence holds already; how many it holds then.

    Raises ForeignKV, AlteredKV, and ValueError where tokens would be missing in between or there is no room.
    """
    return put_kv(pool, handle, checked(pool.layout, data))


def put_kv(pool: KVRanges, handle: int, found: CheckedKV) -> int:
    """As `write_kv`, of what was checked with the pool's layout, in any thread."""
    first, end = found.first, found.end
    held = pool.length(handle)
    if held >= end:
        return held
    layout = pool.layout
    if held < first or held % layout.block_tokens or end > pool.reserved(handle):
        room = pool.reserved(handle)
        raise ValueError(f"tokens {first} to {end} for a sequence that holds {held} and has room for {room}")
    rows = layout.rounded(end) - first
    arrays = np.frombuffer(found.payload, np.uint8).reshape(_shape(layout, rows))
    pool.copy_in(pool.start(handle) + held, arrays[:, :, :, held - first :])
    pool.extend(handle, end - held)
    return end


def checked(layout: KVLayout, data: bytes | bytearray | memoryview) -> CheckedKV:
    """Raises ForeignKV or AlteredKV."""
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
