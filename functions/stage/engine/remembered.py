"""The memory tier: what ended sequences held stays until memory is wanted, and is found again by its chain.

A range of the KV arena is of a sequence that runs, or remembered. Both are found: a follow-up turn takes a remembered range
over as it is, whatever begins like another sequence copies the beginning. What is remembered counts as free, and goes, least
recently used first, when room is wanted: it is never a reason for `full`. Only the engine's thread comes here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, common_blocks
from functions.stage.engine.held_chains import HeldChains
from functions.stage.models.kv_ranges import KVRanges
from functions.stage.models.layer_group import KVCache


@dataclass(frozen=True, slots=True)
class Left:
    """What is about to be forgotten, and can still be read."""

    handle: int
    chain: Chain
    """Of all the tokens held."""


def _forgotten(_: Left) -> None:
    pass


class Remembered:
    """Hands out the memory of a `KVCache`. One that has no ranges (transformers' modules) remembers nothing.

    on_evicted: told of what is forgotten because memory is wanted, on the engine's thread, before it is gone.
    """

    def __init__(self, kv: KVCache, on_evicted: Callable[[Left], None] = _forgotten) -> None:
        self._kv = kv
        self._ranges = kv if isinstance(kv, KVRanges) else None
        self._chains = HeldChains()
        self._ended: dict[int, None] = {}
        """Handles nobody uses, least recently used first."""
        self._tokens = 0
        """That they take."""
        self.on_evicted = on_evicted
        self.on_found: Callable[[int], None] = lambda tokens: None
        """Told how many tokens need not be computed, each time that some are found."""

    @property
    def free_tokens(self) -> int:
        """That can be reserved, what is remembered among them."""
        return self._kv.free_tokens + self._tokens

    @property
    def remembers(self) -> bool:
        return self._ranges is not None

    @property
    def tokens(self) -> int:
        """Remembered."""
        return self._tokens

    @property
    def digests(self) -> int:
        """By which something is found."""
        return len(self._chains)

    def reserve(self, tokens: int, chain: Chain) -> int:
        """A handle with room for `tokens`, which holds of `chain` what is known. Raises KVCacheFull."""
        source, held = self._find(chain)
        if source is not None and source in self._ended and held == BLOCK_TOKENS * len(self._chains.of(source)):
            handle = self._take_over(source, tokens, held)
        else:
            handle = self._room(tokens, source)
            self._fill(handle, source, held)
        self._chains.put(handle, chain if self._ranges is not None else ())
        return handle

    def fill(self, handle: int, chain: Chain) -> int:
        """Looks again, for a handle in use: how many tokens of `chain` it holds now. What it computed beyond the chain that it
        was reserved with is dropped: they may be draft tokens in whose place others came."""
        self.keep(handle, chain)
        source, held = self._find(chain, but=handle)
        if held > self._kv.length(handle):
            self._fill(handle, source, held)
        if self._ranges is not None:
            self._chains.put(handle, chain)
        return min(self._kv.length(handle), BLOCK_TOKENS * len(chain))

    def keep(self, handle: int, chain: Chain) -> None:
        """What `handle` holds is cut to what it surely has in common with `chain`."""
        self._kv.truncate(handle, BLOCK_TOKENS * common_blocks(self._chains.of(handle), chain))

    def end(self, handle: int, chain: Chain = ()) -> None:
        """Nobody uses `handle` any more. chain: of what it may hold; empty: what it was reserved with."""
        chain = chain or self._chains.of(handle)
        chain = chain[: self._kv.length(handle) // BLOCK_TOKENS]
        holder, held = self._find(chain, but=handle)
        if self._ranges is None or not chain or held == BLOCK_TOKENS * len(chain):
            if holder is not None:
                self._touch(holder)
            self._release(handle)
            return
        for other in self._chains.beginnings(chain):
            if other in self._ended:
                self._forget(other)
        self._ranges.shrink(handle, BLOCK_TOKENS * len(chain))
        self._chains.put(handle, chain)
        self._ended[handle] = None
        self._tokens += self._taken(handle)

    def drop(self, handle: int) -> None:
        """Nobody uses `handle` any more, and nothing of it is remembered."""
        self._release(handle)

    def left(self) -> list[Left]:
        """All that is remembered, most recently used first."""
        return [Left(handle, self._chains.of(handle)) for handle in reversed(self._ended)]

    def still_has(self, left: Left) -> bool:
        return left.handle in self._ended and self._chains.of(left.handle) == left.chain

    @property
    def ranges(self) -> KVRanges | None:
        """The arena; None: what is held cannot be read."""
        return self._ranges

    def holding(self, digest: bytes, blocks: int) -> int | None:
        """A handle that holds the `blocks` that end with `digest`; of a sequence that runs, or a remembered one."""
        return self._chains.holder(digest, blocks, self._kv.length)

    def holder(self, chain: Chain) -> tuple[int | None, int]:
        """Who holds most of `chain`, a sequence that runs or a remembered one, and how many tokens of it."""
        return self._find(chain)

    def _find(self, chain: Chain, but: int | None = None) -> tuple[int | None, int]:
        return self._chains.longest(chain, self._kv.length, but)

    def _take_over(self, source: int, tokens: int, held: int) -> int:
        """Where it is, if there is room behind it; else it moves. Where there is room for one of both only, it is forgotten."""
        assert self._ranges is not None
        self._touch(source)
        taken = self._taken(source)
        if self._ranges.grow(source, tokens):
            del self._ended[source]
            self._tokens -= taken
            self.on_found(held)
            return source
        handle = self._room(tokens, source)
        if self._fill(handle, source, held):
            self._forget(source)
        return handle

    def _room(self, tokens: int, source: int | None) -> int:
        """A range for `tokens`; what is remembered makes room, `source` at the very last. Raises KVCacheFull."""
        if self._ranges is not None:
            others = [handle for handle in self._ended if handle != source]
            for handle in self._ranges.to_drop(tokens, others):
                self._evict(handle)
            if self._kv.free_tokens < self._ranges.taken(tokens) <= self.free_tokens:
                for handle in [*others, *([source] if source in self._ended else [])]:
                    self._evict(handle)
        return self._kv.reserve(tokens)

    def _fill(self, handle: int, source: int | None, held: int) -> bool:
        """Whether `source` was still there."""
        if self._ranges is None or source is None or not self._chains.of(source):
            return False
        self.on_found(held - self._kv.length(handle))
        self._ranges.copy(source, handle, held)
        self._touch(source)
        return True

    def _touch(self, handle: int) -> None:
        if handle in self._ended:
            self._ended[handle] = self._ended.pop(handle)

    def _evict(self, handle: int) -> None:
        if handle in self._ended:
            self.on_evicted(Left(handle, self._chains.of(handle)))
            self._forget(handle)

    def _forget(self, handle: int) -> None:
        self._tokens -= self._taken(handle)
        del self._ended[handle]
        self._release(handle)

    def _release(self, handle: int) -> None:
        self._chains.remove(handle)
        self._kv.release(handle)

    def _taken(self, handle: int) -> int:
        assert self._ranges is not None
        return self._ranges.taken(self._kv.reserved(handle))
