"""What a sequence begins with, as a chain of digests: one for each whole block of tokens, of it and of all before it.

Two sequences that share the first n digests have the same first n blocks, so keys and values of the one are those of the
other. The key of the digests is made of the pipeline and of whoever may share, so that what others hold is never found. The
gateway computes chains; stages only compare. Pure functions.
"""

from array import array
from collections.abc import Sequence
from typing import Final

from blake3 import blake3

BLOCK_TOKENS: Final = 16
"""Of a digest. What lies behind the last whole block is computed again: in 32 prompts of 1,050 tokens that share 1,000, blocks
of 64 would leave 90 for each, blocks of 16 leave 58."""
DIGEST_BYTES: Final = 16

Chain = tuple[bytes, ...]
"""A digest for each block, in their order."""


def chain_key(pipeline: str, sharer: str) -> bytes:
    """32 bytes. pipeline: its fingerprint. sharer: who may find what is held; empty: all of the pipeline."""
    return blake3(f"{pipeline} {sharer}".encode(), derive_key_context="lamina prefix chain 1").digest()


def extended(chain: Chain, token_ids: Sequence[int], key: bytes) -> Chain:
    """The chain of all whole blocks of `token_ids`, of which `chain` is the beginning."""
    digests = list(chain)
    last = digests[-1] if digests else b""
    blocks = len(token_ids) // BLOCK_TOKENS
    for first in range(len(digests) * BLOCK_TOKENS, blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        block = array("i", token_ids[first : first + BLOCK_TOKENS]).tobytes()
        last = blake3(last + block, key=key).digest(length=DIGEST_BYTES)
        digests.append(last)
    return tuple(digests)


def packed(chain: Chain) -> bytes:
    """As it travels: one digest behind the other."""
    return b"".join(chain)


def unpacked(data: bytes) -> Chain:
    """Raises ValueError where `data` is not whole digests."""
    if len(data) % DIGEST_BYTES:
        raise ValueError(f"a chain of {len(data)} bytes is not a multiple of {DIGEST_BYTES}")
    return tuple(data[first : first + DIGEST_BYTES] for first in range(0, len(data), DIGEST_BYTES))


def common_blocks(one: Chain, other: Chain) -> int:
    """Blocks that both begin with. A digest stands for all before it, so that a few comparisons are enough."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
