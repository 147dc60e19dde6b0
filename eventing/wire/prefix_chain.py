"""The prefix chain of a sequence: one digest per whole block of tokens, over the block and all blocks before it.

Sequences with the same first n digests have the same first n blocks. The key of the digests depends on the pipeline and on the
clients that may share, so one client cannot find another's KV. The gateway computes chains; stages only compare them.

Keys and values depend, to the bit, also on what computed them: CPU level and dtypes of the stage and of all stages before it. A
digest of these is the lineage, which travels with the events. A stage finds KV by chain and lineage. All functions are pure.
"""

import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from blake3 import blake3

# Tokens after the last whole block are computed again: of prompts of 1,050 tokens that share 1,000, blocks of 64 leave 90 to
# compute and blocks of 16 leave 58.
BLOCK_TOKENS: Final = 16
DIGEST_BYTES: Final = 16
LINEAGE_BYTES: Final = 8
LINEAGE: Final = re.compile(f"[0-9a-f]{{{2 * LINEAGE_BYTES}}}")  # as text: hexadecimal

Chain = tuple[bytes, ...]  # the digests of successive blocks


def chain_key(pipeline: str, sharer: str, adapter: bytes = b"") -> bytes:
    """Returns the key of a chain's digests, 32 bytes.

    `pipeline` is the pipeline's fingerprint. Sequences of the client `sharer` may share KV with one another; if it is empty,
    those of all clients may. `adapter` is the digest of the adapter's version, whose KV differs; it is empty without an
    adapter.
    """
    adapted = f"{pipeline} adapter {adapter.hex()}" if adapter else pipeline
    return blake3(f"{adapted} {sharer}".encode(), derive_key_context="lamina prefix chain 1").digest()


def extended(chain: Chain, token_ids: Sequence[int], key: bytes) -> Chain:
    """Returns the chain of all whole blocks of `token_ids`.

    `chain` has the digests of the first blocks that are known already, if any. `key` comes from `chain_key`.
    """
    digests = list(chain)
    last = digests[-1] if digests else b""
    blocks = len(token_ids) // BLOCK_TOKENS
    for first in range(len(digests) * BLOCK_TOKENS, blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        block = array("i", token_ids[first : first + BLOCK_TOKENS]).tobytes()
        last = blake3(last + block, key=key).digest(length=DIGEST_BYTES)
        digests.append(last)
    return tuple(digests)


@lru_cache(maxsize=256)
def lineage_after(before: str, kind: str) -> str:
    """Returns the lineage, in hexadecimal, of the KV that a stage computes and of the hidden states that it sends on.

    `before` is the lineage of the stage's input; it is empty for the first stage. `kind` names all that the stage's own bits
    depend on.
    """
    data = f"{before} {kind}".encode()
    return blake3(data, derive_key_context="lamina lineage 1").hexdigest(length=LINEAGE_BYTES)


def under(chain: Chain, lineage: str | None) -> Chain:
    """Returns the keys by which a stage finds KV of a lineage: each digest followed by the lineage.

    Returns none if `lineage` is None, which means that it is unknown.
    """
    if lineage is None:
        return ()
    suffix = bytes.fromhex(lineage)
    return tuple(digest + suffix for digest in chain)


def packed(chain: Chain) -> bytes:
    """Encodes a chain for the wire: its digests, joined."""
    return b"".join(chain)


def unpacked(data: bytes) -> Chain:
    """Decodes a chain from the wire. Raises ValueError if the length is not a multiple of a digest's."""
    if len(data) % DIGEST_BYTES:
        raise ValueError(f"a chain of {len(data)} bytes is not a multiple of {DIGEST_BYTES}")
    return tuple(data[first : first + DIGEST_BYTES] for first in range(0, len(data), DIGEST_BYTES))


def common_blocks(one: Chain, other: Chain) -> int:
    """Returns how many first blocks two chains share. Bisection suffices, as a digest covers all blocks before its own."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
