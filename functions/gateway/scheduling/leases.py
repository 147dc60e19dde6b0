"""Renews the gateway's lease at stages. A stage without a renewal for `LEASE_SECONDS` frees all memory of this gateway."""

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
    """Action: frees the memory of `rows` at one instance and renews this gateway's lease there. `rows` may be empty."""

    instance: Instance
    rows: Items[ReleaseRow]
    awaited_tokens: int = 0  # the stage holds its reply until it could reserve so many, see waiting.BacklogSignals


class LeaseRenewals:
    """Renews the gateway's lease at every instance on a route. Renewals are release events, which mostly have no rows.

    Forward events are not enough: a step may spend longer at another stage than the lease lasts. A renewal also repeats
    releases that failed. An instance on no route gets no renewal, so its lease expires and it frees this gateway's memory.
    Until then the rows of failed releases are kept here, because a route may use the instance again.
    """

    def __init__(self) -> None:
        self.renew_at = 0.0  # in time.monotonic()
        self._lost: list[tuple[Instance, ReleaseRow, float]] = []  # the float: how long it is kept, in time.monotonic()

    def renew(self, instances: Iterable[Instance], sequences: Mapping[str, Sequence], now: float) -> list[Release]:
        """Returns a release event for each of `instances`, with the rows whose release failed there before.

        `instances` are those of all routes, repeats allowed. `sequences` are keyed by id. A row is left out if its sequence
        uses the instance again. `now` is in time.monotonic(). Sets `renew_at`, the time of the next renewal.
        """
        used = dict.fromkeys(instances)
        self.renew_at = now + RENEWAL_SECONDS
        lost, self._lost = self._lost, [each for each in self._lost if each[0] not in used and now < each[2]]
        return [
            Release(user, [row for instance, row, _ in lost if instance is user and not _is_back(instance, row, sequences)])
            for user in used
        ]

    def release_failed(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        """Keeps rows whose release got no usable reply, so that a renewal repeats the release.

        The instance may have freed them all the same.
        """
        until = time.monotonic() + _KEPT_SECONDS
        self._lost += [(instance, row, until) for row in rows]


def _is_back(instance: Instance, row: ReleaseRow, sequences: Mapping[str, Sequence]) -> bool:
    """Returns whether the row's sequence uses the instance again in the same attempt. Such a row must not be released."""
    sequence = sequences.get(row.id)
    if sequence is None or sequence.route is None or instance not in sequence.route.instances:
        return False
    return sequence.progress.attempt == row.attempt
