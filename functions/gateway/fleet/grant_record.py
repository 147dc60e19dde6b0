"""The record of a fleet's grants: which members have one, and what each gateway wants.

It is kept in memory, or in a Lease of the cluster that all gateways of the fleet share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import msgspec

from functions.gateway.stages.kubernetes_api import KubernetesAPI, ReplaceConflict, reader

RECORD: Final = "lamina.dev/grants"  # annotation of the Lease
_MOST_CONFLICTS: Final = 20  # in a row, until an update gives up


class Grant(msgspec.Struct, omit_defaults=True):
    """The right of a member to use devices. All times in this module are Unix times, because several gateways compare them."""

    devices: int
    granted_at: float
    used_at: float  # when its last request came or ended
    starting: bool = False  # its pods were not all ready since it was granted


class Claim(msgspec.Struct, omit_defaults=True):
    devices: int
    busy: bool = False  # it has let requests in
    waiting_since: float | None = None  # since when its oldest request waits that was not let in
    live: bool = True  # some of these requests are more than lines of batches that have time


class GatewayClaims(msgspec.Struct, omit_defaults=True):
    beat: int = 0  # changes while the gateway lives
    claims: dict[str, Claim] = {}


class GrantRecord(msgspec.Struct, omit_defaults=True):
    """The members with grants, and the claims of each gateway.

    A member's key is the names of its stages' Services, joined by commas.
    """

    grants: dict[str, Grant] = {}
    closed: tuple[str, ...] = ()  # members that have a grant and let no more requests in
    gateways: dict[str, GatewayClaims] = {}
    return_seconds: dict[str, float] = {}  # measured durations of members' starts


Change = Callable[[GrantRecord], None]


@dataclass(frozen=True, slots=True)
class LocalRecord:
    """The record of a fleet that has only one gateway, kept in memory."""

    tick_seconds: ClassVar[float] = 0.2  # how often a gateway that waits looks again
    beat_seconds: ClassVar[float] = 4.0
    _record: GrantRecord = field(default_factory=GrantRecord)

    def update(self, change: Change) -> None:
        change(self._record)


class LeaseRecord:
    """The record in an annotation of an existing Lease.

    Concurrent updates by several gateways are applied one after another.
    """

    tick_seconds: Final = 0.5
    beat_seconds: Final = 4.0  # a gateway with claims writes at least so often

    def __init__(self, api: KubernetesAPI, name: str, gateway: str) -> None:
        """`api` gives access to Leases. `gateway` names this gateway, which becomes the Lease's holder when it writes."""
        self._api = api
        self._name = name
        self._gateway = gateway
        self._read: Callable[[bytes], dict[str, Any]] = reader(dict)
        self._decode: Callable[[bytes], GrantRecord] = reader(GrantRecord)

    def update(self, change: Change) -> None:
        """Reads the record, applies `change`, and writes the record if it differs.

        If another gateway has written meanwhile, reads again and calls `change` again. Raises KubernetesError, Unreadable, or
        an error of urllib3.
        """
        for _ in range(_MOST_CONFLICTS):
            lease = self._read(self._api.get(self._name))
            annotations = lease["metadata"].setdefault("annotations", {}) or {}
            record = self._decode(annotations.get(RECORD, "{}").encode())
            before = copy.deepcopy(record)
            change(record)
            if record == before:
                return
            lease["metadata"]["annotations"] = {**annotations, RECORD: msgspec.json.encode(record).decode()}
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            lease["spec"] = {**(lease.get("spec") or {}), "holderIdentity": self._gateway, "renewTime": now}
            try:
                self._api.replace(self._name, msgspec.json.encode(lease))
            except ReplaceConflict:
                continue
            return
        raise ReplaceConflict
