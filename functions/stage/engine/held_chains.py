"""Which handles hold what: found by the digests of chains."""

from collections.abc import Callable, Iterator

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain


class HeldChains:
    """By digest, which stands for its block and all before it. How much of its chain a handle holds by now, its cache says."""

    def __init__(self) -> None:
        self._chains: dict[int, Chain] = {}
        self._holders: dict[bytes, set[int]] = {}

    def __len__(self) -> int:
        """Digests."""
        return len(self._holders)

    def of(self, handle: int) -> Chain:
        return self._chains.get(handle, ())

    def put(self, handle: int, chain: Chain) -> None:
        """In place of what `handle` had."""
        self.remove(handle)
        if chain:
            self._chains[handle] = chain
        for digest in chain:
            self._holders.setdefault(digest, set()).add(handle)

    def remove(self, handle: int) -> None:
        for digest in self._chains.pop(handle, ()):
            holders = self._holders[digest]
            holders.discard(handle)
            if not holders:
                del self._holders[digest]

    def longest(self, chain: Chain, length: Callable[[int], int], but: int | None = None) -> tuple[int | None, int]:
        """The handle that holds most of `chain`, and how many tokens; but: not that one. length: tokens that a handle holds."""
        for blocks in range(len(chain), 0, -1):
            for handle in self._holders.get(chain[blocks - 1], ()):
                if handle != but and length(handle) >= blocks * BLOCK_TOKENS:
                    return handle, blocks * BLOCK_TOKENS
        return None, 0

    def holder(self, digest: bytes, blocks: int, length: Callable[[int], int]) -> int | None:
        """A handle that holds the `blocks` that end with `digest`."""
        holders = self._holders.get(digest, ())
        return next((handle for handle in holders if length(handle) >= blocks * BLOCK_TOKENS), None)

    def beginnings(self, chain: Chain) -> Iterator[int]:
        """Handles whose chain is the beginning of `chain`, or all of it."""
        for blocks, digest in enumerate(chain, 1):
            yield from [handle for handle in self._holders.get(digest, ()) if len(self._chains[handle]) == blocks]
