"""Where the gateway has sent what begins how: the instances that may hold keys and values of a chain.

Only a guess: an instance may have forgotten, another gateway may know better. What it is good for is that a sequence goes where
it has least to compute; what is held there the reservation says.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain
from functions.gateway.stages.instances import Instance

MOST_DIGESTS: Final = 2**15
"""Of half a million tokens; some 8 MB."""


@dataclass(frozen=True, slots=True)
class Held:
    """So many tokens of a chain, as far as is known, by one instance of each stage."""

    tokens: int = 0
    instances: tuple[Instance, ...] = ()

    def at(self, instance: Instance) -> int:
        """Tokens that `instance` need not compute."""
        return self.tokens if self.instances and self.instances[instance.stage] is instance else 0

    def on(self, instances: Sequence[Instance]) -> float:
        """Tokens that need not be computed there, the mean of all stages."""
        return sum(map(self.at, instances)) / len(instances)


NOTHING: Final = Held()


class WhereHeld:
    """By digest, the least recently seen forgotten first. Not thread-safe: the scheduler's lock is held around it."""

    def __init__(self, most_digests: int = MOST_DIGESTS) -> None:
        self._most_digests = most_digests
        self._places: OrderedDict[bytes, tuple[tuple[Instance, str], ...]] = OrderedDict()

    def __len__(self) -> int:
        """Digests."""
        return len(self._places)

    def put(self, chain: Chain, instances: Sequence[Instance]) -> None:
        """A sequence that begins so is, or was, at `instances`, in their boots of now."""
        place = tuple((instance, instance.boot) for instance in instances)
        for digest in chain:
            self._places[digest] = place
            self._places.move_to_end(digest)
        while len(self._places) > self._most_digests:
            self._places.popitem(last=False)

    def find(self, chain: Chain) -> Held:
        """Where most of it is; an instance that has booted since, or leaves, holds nothing."""
        for blocks in range(len(chain), 0, -1):
            place = self._places.get(chain[blocks - 1], ())
            if any(_is_there(*each) for each in place):
                return Held(blocks * BLOCK_TOKENS, tuple(instance for instance, _ in place))
        return NOTHING


def _is_there(instance: Instance, boot: str) -> bool:
    return instance.boot == boot and instance.ready and not instance.terminating
