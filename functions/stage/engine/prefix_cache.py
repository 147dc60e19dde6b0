"""The prefix cache: keeps the KV of ended sequences in memory until other sequences need the memory.

KV is found by its prefix chain, whether it belongs to a running sequence or is cached. When a conversation continues, its new
sequence takes over the cached memory. A sequence that begins like another one gets a copy of the common prefix. Cached tokens
count as free memory: when a reservation needs the memory, they are evicted, least recently used first. So they never cause a
reservation to fail. Only the thread that holds the engine's lock may call this module.
"""

from collections.abc import Callable
from dataclasses import dataclass

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, common_blocks
from functions.stage.models.kv_cache import KVBlocks, KVBudget


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """KV of an ended sequence in the prefix cache. It can be read as long as `PrefixCache.still_holds` returns True."""

    handle: int  # of its memory in the KV cache
    chain: Chain  # digests of all whole blocks of the prefix
    checkpoints: tuple[int, ...] = ()  # numbers of tokens after which recurrent states are kept


class PrefixCache:
    """Reserves memory in a `KVBudget`, and finds the KV that a new sequence has in common with other sequences.

    If the KV cache is not a `KVBlocks`, nothing is cached or found. A handle names the memory of one sequence. Its chain has a
    digest for each block of tokens, which identifies the block and all blocks before it. The chain covers all tokens that the
    handle is meant to hold; the KV cache knows how many tokens the handle holds now.

    on_evicted: called with a prefix just before it is evicted. on_found: called with the number of tokens that were found.
    """

    def __init__(self, kv: KVBudget, on_evicted: Callable[[CachedPrefix], None] = lambda prefix: None) -> None:
        self._kv = kv
        self.blocks = kv if isinstance(kv, KVBlocks) else None  # None: KV cannot be copied, so nothing is cached
        self._chains: dict[int, Chain] = {}
        self._holders: dict[bytes, set[int]] = {}  # handles by the digests of their chains
        self._cached: dict[int, None] = {}  # handles of ended sequences, least recently used first
        self._cached_units = 0
        self.on_evicted = on_evicted
        self.on_found: Callable[[int], None] = lambda tokens: None

    @property
    def free_tokens(self) -> int:
        """Length of the longest sequence that can be reserved, in tokens. Cached tokens count as free."""
        return (
            self._kv.free_tokens
            if self.blocks is None
            else self.blocks.need.tokens(self.blocks.free_units + self._cached_units)
        )

    @property
    def cached_tokens(self) -> int:
        """Tokens of ended sequences in the cache."""
        return sum(self._kv.length(handle) for handle in self._cached)

    def reserve(self, tokens: int, chain: Chain) -> int:
        """Reserves memory for `tokens`, fills it with the longest known prefix of `chain`, and returns its handle.

        Raises KVCacheFull.
        """
        source, held = self.longest(chain)
        if source is not None and source in self._cached and held == BLOCK_TOKENS * len(self._chains.get(source, ())):
            handle = self._take_over(source, tokens, held)
        else:
            handle = self._allocate(tokens, source)
            self._copy(source, handle, held)
        self._set_chain(handle, chain)
        return handle

    def fill(self, handle: int, chain: Chain) -> int:
        """Searches again for KV of `chain`, for a handle in use. Returns how many tokens of `chain` the handle then holds.

        If the handle had another chain, first drops its KV beyond the common prefix of both chains, which may be of rejected
        draft tokens. If the chain is the same or the KV cache has no blocks, keeps all KV: a repeated reservation must not drop
        KV that was restored or computed since the first one.
        """
        if self.blocks is not None and chain != self._chains.get(handle, ()):
            self.keep(handle, chain)
        source, held = self.longest(chain, but=handle)
        if held > self._kv.length(handle):
            self._copy(source, handle, held)
        self._set_chain(handle, chain)
        self._ask_for_checkpoints(handle, chain)
        return min(self._kv.length(handle), BLOCK_TOKENS * len(chain))

    def _ask_for_checkpoints(self, handle: int, chain: Chain) -> None:
        """Asks for checkpoints of recurrent states at the positions where later sequences are likely to continue.

        These are the end of this prompt, and the end of the longest prefix that it shares with another sequence.
        """
        if self.blocks is None:
            return
        self.blocks.checkpoints.ask(handle, BLOCK_TOKENS * len(chain))
        for blocks in range(len(chain), 0, -1):
            if len(alike := self._holders[chain[blocks - 1]]) > 1:
                for other in alike:
                    self.blocks.checkpoints.ask(other, BLOCK_TOKENS * blocks)
                break

    def keep(self, handle: int, chain: Chain) -> None:
        """Drops the tokens that `handle` holds beyond the common prefix of its chain and `chain`."""
        self._kv.truncate(handle, BLOCK_TOKENS * common_blocks(self._chains.get(handle, ()), chain))

    def unfindable_from(self, handle: int, tokens: int) -> None:
        """Shortens the chain of a handle to the first `tokens`, so that searches no longer find later tokens there."""
        self._set_chain(handle, self._chains.get(handle, ())[: tokens // BLOCK_TOKENS])

    def end(self, handle: int, chain: Chain = ()) -> None:
        """Ends the sequence of a handle. Caches the whole blocks of its KV, unless another handle holds them too.

        chain: of all tokens of the sequence. If empty, the chain of the reservation is used.
        """
        chain = chain or self._chains.get(handle, ())
        chain = chain[: self._kv.length(handle) // BLOCK_TOKENS]
        if self.blocks is not None:
            chain = chain[: self.blocks.last_held(handle, BLOCK_TOKENS * len(chain)) // BLOCK_TOKENS]
        holder, held = self.longest(chain, but=handle)
        tokens = BLOCK_TOKENS * len(chain)
        if self.blocks is None or tokens in (0, held):
            if holder is not None:
                self._touch(holder)
            self.drop(handle)
            return
        for blocks, digest in enumerate(chain, 1):  # what is cached of a prefix of this chain is not needed any more
            for other in [other for other in self._holders.get(digest, ()) if len(self._chains[other]) == blocks]:
                if other in self._cached and self.blocks.holds(handle, BLOCK_TOKENS * blocks):
                    self._forget(other)
        self.blocks.resize(handle, tokens)
        self._set_chain(handle, chain)
        self._cached[handle] = None
        self._cached_units += self.blocks.units(handle)

    def drop(self, handle: int) -> None:
        """Frees the memory of a handle without caching its KV."""
        self._set_chain(handle, ())
        self._kv.release(handle)

    def cached(self) -> list[CachedPrefix]:
        """Returns all cached prefixes, most recently used first."""
        return [self._prefix(handle) for handle in reversed(self._cached)]

    def still_holds(self, prefix: CachedPrefix) -> bool:
        """Whether the prefix is still cached. False if it was evicted, or if a sequence has taken over its memory."""
        return prefix.handle in self._cached and self._chains.get(prefix.handle) == prefix.chain

    def holder(self, digest: bytes, blocks: int) -> int | None:
        """Returns a handle that holds the prefix of `blocks` blocks whose last digest is `digest`. None if there is none.

        The handle may belong to a running or to a cached sequence, and may hold more tokens. Its layers with sliding windows
        may hold only later tokens.
        """
        holders = self._holders.get(digest, ())
        return next((handle for handle in holders if self._kv.length(handle) >= blocks * BLOCK_TOKENS), None)

    def longest(self, chain: Chain, but: int | None = None) -> tuple[int | None, int]:
        """Returns the handle that holds most of `chain`, and how many tokens of `chain`. (None, 0) if no handle holds any.

        The handle may belong to a running or to a cached sequence. A sequence that is much longer than the common prefix does
        not count if its layers with sliding windows have dropped the tokens that are needed. but: a handle to ignore.
        """
        for blocks in range(len(chain), 0, -1):
            for handle in self._holders.get(chain[blocks - 1], ()):
                if handle != but and self.blocks is not None and self.blocks.holds(handle, blocks * BLOCK_TOKENS):
                    return handle, blocks * BLOCK_TOKENS
        return None, 0

    def _set_chain(self, handle: int, chain: Chain) -> None:
        """Replaces the chain of a handle. With an empty chain, searches do not find the handle."""
        for digest in self._chains.pop(handle, ()):
            holders = self._holders[digest]
            holders.discard(handle)
            if not holders:
                del self._holders[digest]
        if chain and self.blocks is not None:
            self._chains[handle] = chain
            for digest in chain:
                self._holders.setdefault(digest, set()).add(handle)

    def _take_over(self, source: int, tokens: int, held: int) -> int:
        """Turns the cached memory `source` into memory for a sequence of `tokens`. Returns the same handle. Raises KVCacheFull.

        held: how many tokens are cached in that memory.
        """
        assert self.blocks is not None
        self._make_free(self.blocks.need.of(tokens) - self.blocks.units(source), source)
        units = self.blocks.units(source)
        self.blocks.resize(source, tokens)
        del self._cached[source]
        self._cached_units -= units
        self.blocks.checkpoints.ask(source, held)
        self.on_found(held)
        return source

    def _allocate(self, tokens: int, source: int | None) -> int:
        """Reserves memory for `tokens` and returns its handle. Evicts cached prefixes if necessary, `source` last.

        Raises KVCacheFull.
        """
        if self.blocks is not None:
            units = self.blocks.need.of(tokens)
            if not self._make_free(units, source):
                self._make_free(units, None)
        return self._kv.reserve(tokens)

    def _make_free(self, units: int, kept: int | None) -> bool:
        """Evicts cached prefixes, least recently used first, until `units` of memory are free. Never evicts `kept`.

        Evicts nothing and returns False if evicting all other prefixes would not be enough.
        """
        assert self.blocks is not None
        candidates = [handle for handle in self._cached if handle != kept]
        if self.blocks.free_units + sum(map(self.blocks.units, candidates)) < units:
            return False
        for handle in candidates:
            if self.blocks.free_units >= units:
                break
            self.on_evicted(self._prefix(handle))
            self._forget(handle)
        return True

    def _copy(self, source: int | None, target: int, held: int) -> bool:
        """Copies the KV of the first `held` tokens of `source` to `target`.

        Does nothing and returns False if `source` is None or was evicted, or if KV has no blocks.
        """
        if self.blocks is None or source is None or not self._chains.get(source, ()):
            return False
        self.on_found(held - self._kv.length(target))
        self.blocks.copy(source, target, held)
        self._touch(source)
        return True

    def _touch(self, handle: int) -> None:
        if handle in self._cached:
            self._cached[handle] = self._cached.pop(handle)

    def _prefix(self, handle: int) -> CachedPrefix:
        checkpoints = () if self.blocks is None else self.blocks.checkpoints.of(handle)
        return CachedPrefix(handle, self._chains.get(handle, ()), checkpoints)

    def _forget(self, handle: int) -> None:
        assert self.blocks is not None
        self._cached_units -= self.blocks.units(handle)
        del self._cached[handle]
        self.drop(handle)
