"""What a stage holds, for another instance of it: parts of conversations by their digest, and of sequences that move there."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from eventing.wire.kv_query import KVQuery
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.sequences import SequenceTable
from functions.stage.models.kv_bytes import copied_kv, stamp

T = TypeVar("T")


class Holder(Protocol):
    """An Engine is one."""

    def with_sequences(self, action: Callable[[SequenceTable], T]) -> T: ...


def hand_over(query: KVQuery, holder: Holder) -> tuple[bytearray, int] | None:
    """The bytes, and how many tokens are held of the sequence (0: it was found by its digest); None: not held here."""
    found = holder.with_sequences(lambda sequences: _copied(query, sequences))
    if found is not None:
        stamp(found[0])
    return found


def _copied(query: KVQuery, sequences: SequenceTable) -> tuple[bytearray, int] | None:
    pool = sequences.memory.ranges
    if pool is None or query.first % pool.layout.block_tokens:
        return None
    handle = None if query.id is None else sequences.handle(query.id, query.attempt, query.source)
    if handle is not None and pool.length(handle) >= query.end:
        return copied_kv(pool, handle, query.first, query.end), pool.length(handle)
    if not query.digest:
        return None
    handle = sequences.memory.holding(bytes.fromhex(query.digest), query.end // BLOCK_TOKENS)
    return None if handle is None else (copied_kv(pool, handle, query.first, query.end), 0)
