"""Remembers to which instances the gateway sent each prefix chain, so that a sequence goes where its prefix may be cached.

This is only a hint: an instance may have evicted the prefix, and other gateways send sequences too. The reply to a reservation
says what an instance really holds.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain
from functions.gateway.stages.routes import NOTHING, Held, Instance

MAX_DIGESTS: Final = 2**15  # of half a million tokens; some 8 MB


@dataclass(frozen=True, slots=True, eq=False)
class WhereHeld:
    """Maps digests of prefix chains to instances, and forgets the least recently used digests.

    The scheduler's lock protects it.
    """

    _places: OrderedDict[bytes, tuple[tuple[Instance, str], ...]] = field(default_factory=OrderedDict)

    def put(self, chain: Chain, instances: Sequence[Instance]) -> None:
        """Records that a sequence with this chain runs, or ran, at `instances`, one per stage.

        The record is void for an instance that restarts.
        """
        place = tuple((instance, instance.boot) for instance in instances)
        for digest in chain:
            self._places[digest] = place
            self._places.move_to_end(digest)
        while len(self._places) > MAX_DIGESTS:
            self._places.popitem(last=False)

    def find(self, chain: Chain) -> Held:
        """Returns the longest known part of the chain and the instances that hold it. NOTHING if no part is known.

        A part is known only if one of its instances is ready, does not terminate and has not restarted.
        """
        for blocks in range(len(chain), 0, -1):
            place = self._places.get(chain[blocks - 1], ())
            if any(instance.boot == boot and instance.ready and not instance.terminating for instance, boot in place):
                return Held(blocks * BLOCK_TOKENS, tuple(instance for instance, _ in place))
        return NOTHING

    def holder(self, chain: Chain, stage: int) -> tuple[int, Instance | None]:
        """Returns how many tokens of the chain an instance of `stage` holds, and that instance. (0, None) if none is known.

        The tokens are those of the longest known part of the chain. The instance may be terminating.
        """
        for blocks in range(len(chain), 0, -1):
            if place := self._places.get(chain[blocks - 1]):
                instance, boot = place[stage]
                if instance.boot == boot:
                    return blocks * BLOCK_TOKENS, instance
        return 0, None
