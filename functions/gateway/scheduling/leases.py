"""Renewals of the gateway's lease at stages, which free what it holds there after `LEASE_SECONDS` without one."""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

from eventing.wire.control import LEASE_SECONDS, RENEWAL_SECONDS, ReleaseRow
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.routes import Instance

_KEPT_SECONDS: Final = 2 * LEASE_SECONDS  # after so long without contact a stage has freed all that was this gateway's


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """Action: free the memory of `rows` at one instance. With or without rows, it renews this gateway's lease there."""

    instance: Instance
    rows: Items[ReleaseRow]
    awaited_tokens: int = 0  # the stage holds its reply until it could reserve so many, see waiting.BacklogSignals


class LeaseRenewals:
    """Renews the gateway's lease at every instance that a route uses, by release events, which mostly have no rows.

    Forward events are not enough: a step may spend longer at another stage than the lease lasts. A renewal also repeats
    releases that failed. An instance that no route uses gets no renewal, and frees by itself what could not be released. Until
    then those rows are kept here, because the gateway may use the instance again.
    """

    def __init__(self) -> None:
        self.renew_at = 0.0  # in time.monotonic()
        self._lost: list[tuple[Instance, ReleaseRow, float]] = []  # the float: how long it is kept, in time.monotonic()

    def renew(self, instances: Iterable[Instance], sequences: Mapping[str, Sequence], now: float) -> list[Release]:
        """Returns a release event for each of `instances`, with the rows whose release failed there before.

        instances: all that routes use, repeats allowed. sequences: by id; rows of those that use the instance again are left
        out. now: in time.monotonic(). The next renewal is due at `renew_at`.
        """
        used = dict.fromkeys(instances)
        self.renew_at = now + RENEWAL_SECONDS
        lost, self._lost = self._lost, [each for each in self._lost if each[0] not in used and now < each[2]]
        return [
            Release(user, [row for instance, row, _ in lost if instance is user and not _is_back(instance, row, sequences)])
            for user in used
        ]

    def release_failed(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        """Keeps rows whose release got no usable reply, so that a renewal repeats it. The instance may have freed them."""
        until = time.monotonic() + _KEPT_SECONDS
        self._lost += [(instance, row, until) for row in rows]


def _is_back(instance: Instance, row: ReleaseRow, sequences: Mapping[str, Sequence]) -> bool:
    """Whether the sequence uses the instance again, in the same attempt. If so, its row must not be released."""
    sequence = sequences.get(row.id)
    if sequence is None or sequence.route is None or instance not in sequence.route.instances:
        return False
    return sequence.progress.attempt == row.attempt
