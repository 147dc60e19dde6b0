"""Restores the KV of sequences from the tiers, in threads that run in parallel to the engine's passes."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from eventing.problems import NotReady
from eventing.wire.control import ReservedRow, ReserveRow
from eventing.wire.events import Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, under
from functions.stage.engine.kv_tiers import ComputeRate, Restore, RestoreRequest, Reuse, SequenceGone, Tier
from functions.stage.engine.sequences import SequenceTable
from functions.stage.models.kv_cache import KVBlocks
from functions.threads.pool import ThreadPool

_log: Final = logging.getLogger(__name__)

_AT_ONCE: Final = 64  # restores that run at a time; others wait for a thread

WithSequences = Callable[[Callable[[SequenceTable], int]], int]
"""Calls a function with the sequence table between two passes, and returns the function's result.

Raises NotReady, and what the function raises.
"""


class Restorer:
    """Restores sequences from the tiers, each in a thread of its own."""

    def __init__(
        self, tiers: Sequence[Tier], with_sequences: WithSequences, rate: ComputeRate, on_reuse: Callable[[Reuse], None]
    ) -> None:
        """Prepares to ask `tiers`, in their order. rate, on_reuse: as for `Engine`."""
        self._tiers = tuple(tiers)
        self._with_sequences = with_sequences
        self._rate = rate
        self._on_reuse = on_reuse
        self._threads = ThreadPool(_AT_ONCE, "restore")

    def begin(
        self, row: ReserveRow, lineage: str | None, reserved: ReservedRow, source: str, deadline: float
    ) -> Restore | None:
        """Begins to restore the KV that a sequence lacks of its chain.

        Returns None if nothing is to be restored: no KV is missing, the reservation was refused, there are no tiers, or the
        lineage is unknown (None). reserved: the reply to `row` so far. deadline: of the restore, in time.monotonic().
        """
        complete = reserved.held >= BLOCK_TOKENS * len(row.digests)
        if not self._tiers or lineage is None or reserved.status is not Status.OK or complete:
            return None
        over = self._threads.submit(self._restore, row, lineage, reserved, source, deadline)
        return Restore(row, lineage, reserved, over)

    def _restore(self, row: ReserveRow, lineage: str, reserved: ReservedRow, source: str, deadline: float) -> ReservedRow:
        """Asks one tier after the other until the sequence holds its whole chain.

        Returns a copy of `reserved` that says how many tokens the sequence then holds.
        """

        def with_cache(action: Callable[[KVBlocks, int], int]) -> int:
            def act(sequences: SequenceTable) -> int:
                holder = sequences.holder(row.id, row.attempt, source, lineage)
                if holder is None or sequences.cache.blocks is None:
                    raise SequenceGone(row.id)
                return action(sequences.cache.blocks, holder[0])

            return self._with_sequences(act)

        for tier in self._tiers:
            if reserved.held >= BLOCK_TOKENS * len(row.digests):
                break
            request = RestoreRequest(
                under(row.digests, lineage),
                lineage,
                reserved.held,
                with_cache,
                sequence=(row.id, row.attempt, source),
                peers=row.peers,
                draws_by_tokens=bool(row.token_ids),
                deadline=deadline,
            )
            began = time.perf_counter()
            try:
                held = tier.restore(request)
            except (SequenceGone, NotReady):
                break
            except Exception:  # noqa: BLE001 - the end of a thread; what is not restored is computed
                _log.exception("%s: nothing is restored from the tier %s", row.id, tier.name)
                continue
            if held > reserved.held:
                self._on_reuse(self._rate.reuse(tier.name, held - reserved.held, time.perf_counter() - began))
            reserved = replace(reserved, held=held)
        return reserved
