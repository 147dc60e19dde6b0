"""Renewal of what the gateway holds at stages, which they free if they do not hear of it (`LEASE_SECONDS`)."""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

from eventing.wire.control import LEASE_SECONDS, RENEWAL_SECONDS, ReleaseRow
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.routes import Instance

_KEPT_SECONDS: Final = 2 * LEASE_SECONDS  # after so long without contact a stage has freed all that was this gateway's


@dataclass(frozen=True, slots=True)
class _LostRelease:
    instance: Instance
    row: ReleaseRow
    until: float  # in time.monotonic()


class LeaseRenewals:
    """A release event, mostly without rows, renews the lease at every instance of a route.

    Steps alone do not renew it: one at another stage may take longer than the lease. A renewal also repeats releases that
    failed. A gateway that holds nothing sends nothing, and stages free by themselves what it could not release; until then the
    rows are kept here, for the gateway may use the instance again before.
    """

    def __init__(self) -> None:
        self.renew_at = 0.0  # in time.monotonic()
        self._lost: list[_LostRelease] = []

    def renew(self, instances: Iterable[Instance], sequences: Mapping[str, Sequence], now: float) -> list[Release]:
        """A renewal for each of the instances that routes use. sequences: by id."""
        used = dict.fromkeys(instances)
        self.renew_at = now + RENEWAL_SECONDS
        lost, self._lost = self._lost, [each for each in self._lost if each.instance not in used and now < each.until]
        return [
            Release(instance, [each.row for each in lost if each.instance is instance and not _is_back(each, sequences)])
            for instance in used
        ]

    def release_failed(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        """Whether the release arrived is not known."""
        until = time.monotonic() + _KEPT_SECONDS
        self._lost += [_LostRelease(instance, row, until) for row in rows]


def _is_back(lost: _LostRelease, sequences: Mapping[str, Sequence]) -> bool:
    """The sequence uses the instance again, in the same attempt."""
    sequence = sequences.get(lost.row.id)
    if sequence is None or sequence.route is None or lost.instance not in sequence.route.instances:
        return False
    return sequence.progress.attempt == lost.row.attempt
