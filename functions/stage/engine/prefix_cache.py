"""The prefix cache: KV of ended sequences stays in memory until the memory is needed, and is found again by its prefix chain.

A range of the KV arena belongs to a running sequence or is cached. Both kinds are found by chain. A conversation that goes on
extends its cached range in place; a sequence that begins like another one copies the common prefix. Cached tokens count as
free. They are evicted, least recently used first, when a reservation needs their memory, so they never cause `full`.
Only the thread that holds the engine's lock may call this.
"""

from collections.abc import Callable
from dataclasses import dataclass

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, common_blocks
from functions.stage.models.kv_cache import KVRanges
from functions.stage.models.layer_group import KVCache


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """KV of an ended sequence in the prefix cache. It can be read as long as `still_holds` says so."""

    handle: int  # of its range in the KV cache
    chain: Chain  # digests of all whole blocks that it holds


class PrefixCache:
    """Reserves memory in a `KVCache`, and finds there the KV that a new sequence has in common with others.

    With a KV cache that is no `KVRanges` (transformers' modules) it never finds anything. A digest identifies its block and all
    blocks before it, so handles are found by the digests of their chains. A handle's chain covers all tokens that it is meant
    to hold; the KV cache knows how many it holds now.

    on_evicted: called with a prefix just before it is evicted. on_found: called with the number of tokens that were found.
    """

    def __init__(self, kv: KVCache, on_evicted: Callable[[CachedPrefix], None] = lambda prefix: None) -> None:
        self._kv = kv
        self.ranges = kv if isinstance(kv, KVRanges) else None  # None: KV cannot be copied, so nothing is cached
        self._chains: dict[int, Chain] = {}
        self._holders: dict[bytes, set[int]] = {}  # handles by the digests of their chains
        self._cached: dict[int, None] = {}  # handles of ended sequences, least recently used first
        self.cached_tokens = 0
        self.on_evicted = on_evicted
        self.on_found: Callable[[int], None] = lambda tokens: None

    @property
    def free_tokens(self) -> int:
        """KV tokens that can be reserved, cached ones included."""
        return self._kv.free_tokens + self.cached_tokens

    def reserve(self, tokens: int, chain: Chain) -> int:
        """Reserves memory for `tokens`. Returns its handle, which holds as much of `chain` as was found. Raises KVCacheFull."""
        source, held = self.longest(chain)
        if source is not None and source in self._cached and held == BLOCK_TOKENS * len(self._chains.get(source, ())):
            handle = self._take_over(source, tokens, held)
        else:
            handle = self._allocate(tokens, source)
            self._copy(source, handle, held)
        self._set_chain(handle, chain)
        return handle

    def fill(self, handle: int, chain: Chain) -> int:
        """Searches again for `chain`, on behalf of a handle in use. Returns how many tokens of `chain` the handle holds then.

        Drops what the handle holds beyond the chain that it was reserved with: that may be rejected draft tokens.
        """
        self.keep(handle, chain)
        source, held = self.longest(chain, but=handle)
        if held > self._kv.length(handle):
            self._copy(source, handle, held)
        self._set_chain(handle, chain)
        return min(self._kv.length(handle), BLOCK_TOKENS * len(chain))

    def keep(self, handle: int, chain: Chain) -> None:
        """Drops the tokens that `handle` holds beyond the common prefix of its chain and `chain`."""
        self._kv.truncate(handle, BLOCK_TOKENS * common_blocks(self._chains.get(handle, ()), chain))

    def end(self, handle: int, chain: Chain = ()) -> None:
        """Ends the handle's sequence and caches its whole blocks, unless another handle holds them too.

        chain: of all tokens of the sequence; empty: the chain that it was reserved with.
        """
        chain = chain or self._chains.get(handle, ())
        chain = chain[: self._kv.length(handle) // BLOCK_TOKENS]
        holder, held = self.longest(chain, but=handle)
        if self.ranges is None or not chain or held == BLOCK_TOKENS * len(chain):
            if holder is not None:
                self._touch(holder)
            self.drop(handle)
            return
        for blocks, digest in enumerate(chain, 1):  # what is cached of a prefix of this chain is not needed any more
            for other in [other for other in self._holders.get(digest, ()) if len(self._chains[other]) == blocks]:
                if other in self._cached:
                    self._forget(other)
        self.ranges.shrink(handle, BLOCK_TOKENS * len(chain))
        self._set_chain(handle, chain)
        self._cached[handle] = None
        self.cached_tokens += self._size(handle)

    def drop(self, handle: int) -> None:
        """Frees the handle's memory without caching what it holds."""
        self._set_chain(handle, ())
        self._kv.release(handle)

    def cached(self) -> list[CachedPrefix]:
        """All cached prefixes, most recently used first."""
        return [CachedPrefix(handle, self._chains.get(handle, ())) for handle in reversed(self._cached)]

    def still_holds(self, prefix: CachedPrefix) -> bool:
        """False if the prefix has been evicted, or a sequence has taken over its range."""
        return prefix.handle in self._cached and self._chains.get(prefix.handle) == prefix.chain

    def holder(self, digest: bytes, blocks: int) -> int | None:
        """A handle that holds the prefix of `blocks` blocks whose last digest is `digest`; None if there is none.

        It may be of a running sequence or a cached one.
        """
        holders = self._holders.get(digest, ())
        return next((handle for handle in holders if self._kv.length(handle) >= blocks * BLOCK_TOKENS), None)

    def longest(self, chain: Chain, but: int | None = None) -> tuple[int | None, int]:
        """The handle that holds most of `chain`, and how many tokens of it; (None, 0) if none holds any.

        It may be of a running sequence or a cached one. but: a handle to ignore.
        """
        for blocks in range(len(chain), 0, -1):
            for handle in self._holders.get(chain[blocks - 1], ()):
                if handle != but and self._kv.length(handle) >= blocks * BLOCK_TOKENS:
                    return handle, blocks * BLOCK_TOKENS
        return None, 0

    def _set_chain(self, handle: int, chain: Chain) -> None:
        """Replaces the chain by which a handle is found; an empty one makes it unfindable."""
        for digest in self._chains.pop(handle, ()):
            holders = self._holders[digest]
            holders.discard(handle)
            if not holders:
                del self._holders[digest]
        if chain and self.ranges is not None:
            self._chains[handle] = chain
            for digest in chain:
                self._holders.setdefault(digest, set()).add(handle)

    def _take_over(self, source: int, tokens: int, held: int) -> int:
        """Turns a cached range into a sequence's range of `tokens`, and returns the sequence's handle.

        If there is free memory after the range, it grows in place. Otherwise its tokens are copied to a new range, or lost if
        the new range needed its memory. held: tokens that the cached range holds.
        """
        assert self.ranges is not None
        self._touch(source)
        size = self._size(source)
        if self.ranges.grow(source, tokens):
            del self._cached[source]
            self.cached_tokens -= size
            self.on_found(held)
            return source
        handle = self._allocate(tokens, source)
        if self._copy(source, handle, held):
            self._forget(source)
        return handle

    def _allocate(self, tokens: int, source: int | None) -> int:
        """Reserves a new range for `tokens` and returns its handle. Evicts cached ranges if necessary, `source` last.

        Raises KVCacheFull.
        """
        if self.ranges is not None:
            others = [handle for handle in self._cached if handle != source]
            for handle in self.ranges.to_drop(tokens, others):
                self._evict(handle)
            if self._kv.free_tokens < self.ranges.taken(tokens) <= self.free_tokens:
                for handle in [*others, *([source] if source in self._cached else [])]:
                    self._evict(handle)
        return self._kv.reserve(tokens)

    def _copy(self, source: int | None, target: int, held: int) -> bool:
        """Copies the first `held` tokens of `source` to `target`. Does nothing and returns False if `source` was evicted."""
        if self.ranges is None or source is None or not self._chains.get(source, ()):
            return False
        self.on_found(held - self._kv.length(target))
        self.ranges.copy(source, target, held)
        self._touch(source)
        return True

    def _touch(self, handle: int) -> None:
        if handle in self._cached:
            self._cached[handle] = self._cached.pop(handle)

    def _evict(self, handle: int) -> None:
        if handle in self._cached:
            self.on_evicted(CachedPrefix(handle, self._chains.get(handle, ())))
            self._forget(handle)

    def _forget(self, handle: int) -> None:
        self.cached_tokens -= self._size(handle)
        del self._cached[handle]
        self.drop(handle)

    def _size(self, handle: int) -> int:
        """Tokens of memory that the handle's range takes."""
        assert self.ranges is not None
        return self.ranges.taken(self._kv.reserved(handle))
