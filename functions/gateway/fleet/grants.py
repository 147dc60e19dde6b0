"""Decides which members of a fleet may use devices, if there are fewer devices than stages of all members.

A grant lets a member have one pod for each of its stages. A member without a grant sends nothing to its stages, so Knative
keeps them at zero, or scales them to zero. `decide` is a pure function. `Grants` applies it, and shares a GrantRecord with the
fleet's other gateways.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from eventing.problems import NotReady, QueueFull
from functions.gateway.answers.generation import LOOK_SECONDS
from functions.gateway.fleet.grant_record import Claim, GatewayClaims, Grant, GrantRecord, LeaseRecord, LocalRecord
from functions.gateway.fleet.members import Version

_log = logging.getLogger(__name__)

QUANTUM_SECONDS: Final = 30.0  # a busy member keeps its grant for this long while others wait
DEAD_SECONDS: Final = 15.0  # a gateway whose claims have not changed for this long is taken for dead
_STALE_SECONDS: Final = 10.0  # a gateway that has not read the record for this long lets no request in
_START_SECONDS: Final = 300.0  # an idle member whose pods have not come for this long no longer counts as starting
_LINE_SECONDS: Final = 30.0  # how long a line of a batch waits for a device, until it is tried again later
_LEAST_RETURN_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class MemberPods:
    """The present pods of all stages of a member."""

    pods: int = 0  # also those that start or terminate
    leaving: int = 0  # of these, those that the member cannot use any more
    ready: bool = False  # each stage has one that works


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What `decide` must know of one member. All times are seconds of the same clock."""

    name: str
    devices: int  # pods that it has with a grant: its number of stages
    pods: int = 0
    leaving: int = 0
    granted_at: float | None = None  # None: it has no grant
    starting: bool = False  # it has a grant, and its pods are on their way, whether requests still wait for them or not
    in_flight: int = 0  # gateways that let requests in
    waiting_since: float | None = None  # of its oldest request that was not let in
    live: bool = True  # some of these requests are more than lines of batches that have time
    used_at: float = 0.0  # when its last request ended or came
    return_seconds: float = 1.0  # measured duration of its start from zero

    @property
    def is_idle(self) -> bool:
        return not self.in_flight and self.waiting_since is None and not self.starting

    @property
    def usable(self) -> int:
        return self.pods - self.leaving

    @property
    def taken(self) -> int:
        """The number of devices that no other member can get now.

        It counts the member's pods until they are gone; with a grant also the pods that it may still start.
        """
        return self.pods if self.granted_at is None else max(self.devices, self.usable) + self.leaving


@dataclass(frozen=True, slots=True)
class GrantDecision:
    grant: tuple[str, ...] = ()  # get a grant now
    revoke: tuple[str, ...] = ()  # lose it now: they are idle, or have finished what was in flight
    close: frozenset[str] = frozenset()  # let no more requests in, because others have waited long enough


def decide(loads: Sequence[MemberLoad], max_devices: int, now: float) -> GrantDecision:
    """Divides the devices: decides which members get a grant and which must give it back.

    Members that wait get grants in the order of their oldest requests. None overtakes a member that does not fit yet, so each
    gets its turn. Idle members give way first, in the order of their idle time divided by the time that a return takes. If none
    is idle, members that have held their grant for QUANTUM_SECONDS finish what is in flight and give way. Devices count as
    taken until their pods are gone.

    Members with live requests go before members with lines of batches only. The latter give way without a quantum, and make no
    member with live requests give way: they use free devices, and take turns among themselves.
    """
    holders = [each for each in loads if each.granted_at is not None]
    line = [each for each in loads if each.granted_at is None and each.waiting_since is not None]
    line.sort(key=lambda each: (not each.live, each.waiting_since or 0.0))
    free = max_devices - sum(each.taken for each in loads)
    granted, revoked, closed = list[str](), list[str](), set[str]()
    urgent = missing = 0  # devices that must become free for live requests, and for all that wait
    for each in line:
        needed = max(0, each.devices - each.usable)  # its own pods may still be there
        if not missing and needed <= free:
            granted.append(each.name)
            free -= needed
        else:
            urgent, missing = urgent + needed * each.live, missing + needed
    # Pods that leave free their devices without anybody giving way.
    awaited = {each.name for each in line}
    leaving = [each.leaving if each.granted_at is not None else each.pods for each in loads if each.name not in awaited]
    coming = free + sum(leaving)
    urgent, missing = urgent - coming, missing - coming
    # The longer one is idle, and the sooner it would be back, the more it helps that it gives way.
    idle = [each for each in holders if each.is_idle]
    for victim in sorted(idle, key=lambda each: (each.used_at - now) / max(each.return_seconds, _LEAST_RETURN_SECONDS)):
        if urgent <= 0:
            break
        revoked.append(victim.name)
        freed = max(victim.devices, victim.usable)
        urgent, missing = urgent - freed, missing - freed
    for victim in sorted(holders, key=lambda each: (each.live, each.granted_at or 0.0)):
        quantum = QUANTUM_SECONDS if victim.live or urgent <= 0 else 0.0
        wanted = urgent if victim.live else missing
        if wanted <= 0 or victim.is_idle or victim.starting or now - (victim.granted_at or now) < quantum:
            continue
        if victim.in_flight:
            closed.add(victim.name)
        else:
            revoked.append(victim.name)
        freed = max(victim.devices, victim.usable)
        urgent, missing = urgent - freed, missing - freed
    return GrantDecision(tuple(granted), tuple(revoked), frozenset(closed))


class _Member:
    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.in_flight = 0
        self.live = 0  # requests, in flight or waiting, that are no lines of batches, or of batches that are late
        self.waiting: list[float] = []  # when each of these came that was not let in, oldest first
        self.lines: list[float] = []  # the same of other lines
        self.is_open = False  # requests may enter: the record has its grant, and says that this gateway uses it
        self.used_at = time.time()

    @property
    def waiting_since(self) -> float | None:
        return next(iter(self.waiting or self.lines), None)


@dataclass(eq=False)
class Grants:
    """Lets requests in when their members have grants. Thread-safe.

    A thread updates the record when a request wants to enter, and while any request is in flight or waits.
    """

    _max_devices: int
    _all_services: Callable[[], Iterable[Sequence[str]]]  # of all versions of members now, their stages' Services
    _pods: Callable[[Sequence[str]], MemberPods]  # of one of these
    _record: LocalRecord | LeaseRecord
    _gateway: str = ""  # name of this one in the record

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._members: dict[str, _Member] = {}
        # The following belong to the thread.
        self._services: dict[str, Sequence[str]] = {}  # of members that may have pods, also of those that were removed
        self._beats: dict[str, tuple[int, float]] = {}  # of other gateways, and when each was first seen
        self._settled_at = time.monotonic()
        self._due = threading.Event()
        self._stopped = False
        self.thread = threading.Thread(target=self._keep, name="fleet-grants", daemon=True)

    def stop(self) -> None:
        self._stopped = True
        self._due.set()
        self.thread.join()

    def enter(self, version: Version, seconds: float, gone: Callable[[], bool] = lambda: False, *, live: bool = True) -> None:
        """Waits until the member has a grant, and lets the request in. Call `leave` when the request has ended.

        If not `live`, the request is a line of a batch that may wait. `gone` returns at once whether the client has left.
        Raises QueueFull if as many requests wait as the member's `queue_limit`. Raises NotReady if the client has left, if the
        wait takes longer than `seconds`, or if the member needs more devices than there are.
        """
        devices, limit = len(version.services), 0 if version.config is None else version.config.queue_limit
        if devices > self._max_devices:
            raise NotReady(f"member {version.member} needs {devices} devices, and the fleet has {self._max_devices}")
        deadline = time.monotonic() + seconds
        with self._changed:
            member = self._members.setdefault(version.devices_key, _Member(devices))
            line = member.waiting if live else member.lines
            if not member.is_open and len(line) >= limit:
                raise QueueFull(f"{len(line)} requests of member {version.member} wait for a device; ask again later")
            came = member.used_at = time.time()
            line.append(came)
            member.live += live
            if not member.is_open:
                self._due.set()
            try:
                while not member.is_open:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise NotReady(f"no device became free for member {version.member} in {seconds:g} s; ask again later")
                    if gone():
                        raise NotReady("the client has left while its request waited for a device")
                    self._changed.wait(min(left, LOOK_SECONDS))
                member.in_flight += 1
            except BaseException:
                member.live -= live
                raise
            finally:
                line.remove(came)

    @contextmanager
    def turn(
        self, version: Version, live: bool, seconds: float = _LINE_SECONDS, gone: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """A context manager around one request, or one line of a batch: it calls `enter` and `leave`."""
        self.enter(version, seconds, gone, live=live)
        try:
            yield
        finally:
            self.leave(version, live=live)

    def leave(self, version: Version, *, live: bool = True) -> None:
        with self._changed:
            member = self._members[version.devices_key]
            member.in_flight -= 1
            member.live -= live
            member.used_at = time.time()
            if not member.in_flight:
                self._due.set()

    def waits(self) -> dict[str, tuple[int, float]]:
        """Returns, for each member, how many live requests wait for a device, and how long the oldest has waited, in seconds.

        The keys are the `devices_key` of members with such requests.
        """
        now = time.time()
        with self._changed:
            return {
                key: (len(member.waiting), now - member.waiting[0])
                for key, member in self._members.items()
                if member.waiting and not member.is_open
            }

    def _keep(self) -> None:
        while not self._stopped:
            self._due.wait(self._record.tick_seconds if self._members else None)
            self._due.clear()
            try:
                self._settle()
            except Exception as error:  # noqa: BLE001 - without this thread no request would be let in
                _log.warning("what members may use devices could not be agreed on, trying again: %s", error)
                with self._changed:
                    if time.monotonic() - self._settled_at > _STALE_SECONDS:
                        for member in self._members.values():
                            member.is_open = False
                time.sleep(self._record.tick_seconds)

    def _settle(self) -> None:
        """Writes this gateway's claims into the record, and applies the decision to the requests that wait here."""
        with self._changed:
            claims = dict[str, Claim]()
            for key, member in list(self._members.items()):
                since = member.waiting_since
                member.is_open = member.is_open and (member.in_flight > 0 or since is not None)
                claims[key] = Claim(
                    member.devices,
                    member.in_flight > 0 or member.is_open,
                    None if member.is_open else since,
                    member.live > 0,
                )
            used = {key: member.used_at for key, member in self._members.items()}
        opened: set[str] = set()

        def change(record: GrantRecord) -> None:
            nonlocal opened
            opened = self.divide(record, claims, used, time.time())

        self._record.update(change)
        self._settled_at = time.monotonic()
        with self._changed:
            for key, member in list(self._members.items()):
                member.is_open = key in opened
                known = claims.get(key)  # None: its first request has come since, and may have left
                if not member.in_flight and member.waiting_since is None and known is not None and not known.busy:
                    del self._members[key]  # the record says that it is idle
            self._changed.notify_all()

    def divide(self, record: GrantRecord, claims: Mapping[str, Claim], used: Mapping[str, float], now: float) -> set[str]:
        """Writes this gateway's claims into the record and decides. Returns the members whose requests may enter here.

        Only the thread of Grants calls it. `used` is when each member was used last. `now` is a time.time().
        """
        own = self._meet_others(record, claims)
        current = {",".join(each): each for each in self._all_services() if each}
        self._services |= current
        found = {key: self._pods(services) for key, services in self._services.items()}
        for key, grant in list(record.grants.items()):
            pods = found.get(key, MemberPods(grant.devices, ready=True))  # a member that this gateway does not know yet
            grant.used_at = max(grant.used_at, used.get(key, 0.0))
            if grant.starting and pods.ready:
                grant.starting, record.return_seconds[key] = False, round(now - grant.granted_at, 3)
            grant.starting = grant.starting and now - grant.used_at < _START_SECONDS
            busy = any(each.claims[key].busy for each in record.gateways.values() if key in each.claims)
            if not busy and not grant.starting and pods.pods - pods.leaving < grant.devices:
                del record.grants[key]  # it is at zero, or on its way: what comes back needs a device again
        loads = [load for key in {*found, *record.grants, *claims} if (load := _load(record, key, found.get(key))) is not None]
        decision = decide(loads, self._max_devices, now)
        for key in decision.revoke:
            del record.grants[key]
        devices = {each.name: each.devices for each in loads}
        for key in decision.grant:
            record.grants[key] = Grant(devices[key], now, now, not found.get(key, MemberPods()).ready)
        record.closed = tuple(sorted(decision.close))
        for key in [*self._services, *record.return_seconds]:
            if key not in current and key not in record.grants and key not in claims and not found.get(key, MemberPods()).pods:
                self._services.pop(key, None)
                record.return_seconds.pop(key, None)
        opened = {key for key in claims if key in record.grants and key not in decision.close}
        for key, claim in own.items():
            if key in opened and claim.waiting_since is not None:
                claim.busy, claim.waiting_since = True, None
        return opened

    def _meet_others(self, record: GrantRecord, claims: Mapping[str, Claim]) -> dict[str, Claim]:
        """Removes gateways that died from the record, and adds this gateway's claims.

        Returns these claims as they are in the record.
        """
        now = time.monotonic()
        for name, other in list(record.gateways.items()):
            beat, seen_at = self._beats.get(name, (None, now))
            self._beats[name] = (other.beat, now if beat != other.beat else seen_at)
            if name != self._gateway and now - self._beats[name][1] > DEAD_SECONDS:
                del record.gateways[name], self._beats[name]
        record.gateways.pop(self._gateway, None)
        wanted = {key: each for key, each in claims.items() if each.busy or each.waiting_since is not None}
        own = {key: copy.copy(each) for key, each in wanted.items()}
        if own:
            record.gateways[self._gateway] = GatewayClaims(int(now / self._record.beat_seconds), own)
        return own


def _load(record: GrantRecord, key: str, pods: MemberPods | None) -> MemberLoad | None:
    """Returns what `decide` must know of a member; None if it has no pods, no grant and no request."""
    grant = record.grants.get(key)
    claims = [each.claims[key] for each in record.gateways.values() if key in each.claims]
    if grant is None and not claims and (pods is None or not pods.pods):
        return None
    if pods is None:
        pods = MemberPods()
    waiting = [each.waiting_since for each in claims if each.waiting_since is not None]
    may_enter = grant is not None and key not in record.closed
    return MemberLoad(
        key,
        grant.devices if grant is not None else max((each.devices for each in claims), default=0),
        pods.pods,
        pods.leaving,
        None if grant is None else grant.granted_at,
        grant is not None and grant.starting,
        sum(each.busy for each in claims) + (len(waiting) if may_enter else 0),
        None if may_enter or not waiting else min(waiting),
        any(each.live for each in claims),
        0.0 if grant is None else grant.used_at,
        record.return_seconds.get(key, 1.0),
    )
