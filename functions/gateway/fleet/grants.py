"""Which members of a fleet may use devices, if there are fewer devices than the members' stages.

A grant lets a member have one pod of each of its stages; a member without one sends nothing, so Knative keeps it at zero, or
scales it to zero within its window. `decide` is a pure function, `Grants` applies it at this gateway.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from eventing.problems import NotReady
from functions.gateway.fleet.members import Version

QUANTUM_SECONDS: Final = 30.0  # a busy member keeps its grant so long while others wait
_TICK_SECONDS: Final = 0.2
_LEAST_RETURN_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What `decide` knows of a member. Times in seconds of one clock."""

    name: str
    devices: int  # pods that it has with a grant: its number of stages
    pods: int = 0  # that exist now, also those that start or leave
    leaving: int = 0  # of these pods, those that terminate: the member cannot use them again
    granted_at: float | None = None  # None: it has no grant
    in_flight: int = 0  # requests that were let in
    waiting_since: float | None = None  # of its oldest request that was not let in
    used_at: float = 0.0  # when its last request ended or came
    return_seconds: float = 1.0  # measured duration of its start from zero

    @property
    def is_idle(self) -> bool:
        return not self.in_flight and self.waiting_since is None


@dataclass(frozen=True, slots=True)
class GrantDecision:
    grant: tuple[str, ...] = ()  # get a grant now
    revoke: tuple[str, ...] = ()  # lose it now: they are idle, or have finished what was in flight
    close: frozenset[str] = frozenset()  # let no more requests in, because others have waited long enough


def decide(loads: Sequence[MemberLoad], max_devices: int, now: float) -> GrantDecision:
    """Divides the devices.

    Members get grants in the order in which their oldest requests came; none overtakes one that does not fit yet, so that each
    is next at some time. Idle members give way first: those without pods, then by idle time divided by the time that a return
    takes. If none is idle, members that have held their grant for QUANTUM_SECONDS finish what is in flight and give way.
    Devices count as taken until their pods are gone.
    """
    holders = {each.name: each for each in loads if each.granted_at is not None}
    line = sorted((each for each in loads if each.granted_at is None and each.waiting_since is not None), key=_since)
    free = max_devices - sum(max(each.devices, each.pods) if each.name in holders else each.pods for each in loads)
    granted, revoked, closed = list[str](), list[str](), set[str]()
    missing = 0  # devices that must become free for all that wait
    for each in line:
        needed = each.devices - (each.pods - each.leaving)  # its own pods may still be there
        if not missing and needed <= free:
            granted.append(each.name)
            free -= needed
        else:
            missing += needed
    # Members that have given way free theirs without being asked again, once their pods have left.
    awaited = {each.name for each in line}
    missing -= free + sum(each.pods for each in loads if each.granted_at is None and each.name not in awaited) if missing else 0
    for victim in sorted((each for each in holders.values() if each.is_idle), key=lambda each: -_worth(each, now)):
        if missing <= 0:
            break
        revoked.append(victim.name)
        missing -= max(victim.devices, victim.pods)
    for victim in sorted(holders.values(), key=lambda each: each.granted_at or 0.0):
        held = now - (victim.granted_at or now)
        if missing <= 0 or victim.is_idle or held < QUANTUM_SECONDS:
            continue
        if victim.in_flight:
            closed.add(victim.name)
        else:
            revoked.append(victim.name)
        missing -= max(victim.devices, victim.pods)
    return GrantDecision(tuple(granted), tuple(revoked), frozenset(closed))


def _since(load: MemberLoad) -> float:
    return math.inf if load.waiting_since is None else load.waiting_since


def _worth(load: MemberLoad, now: float) -> float:
    """How much it helps that an idle member gives way: the longer it is idle and the sooner it is back, the more."""
    return math.inf if not load.pods else (now - load.used_at) / max(load.return_seconds, _LEAST_RETURN_SECONDS)


class _Holder:
    """A member's state at this gateway."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.devices = len(version.services)
        self.granted_at: float | None = None
        self.starting_since: float | None = None
        self.return_seconds = 1.0
        self.in_flight = 0
        self.waiting: list[float] = []  # when each request came that was not let in, oldest first
        self.closed = False
        self.used_at = time.monotonic()


class Grants:
    """Lets requests in while their members have grants. Thread-safe. For one gateway: several do not know of each other."""

    def __init__(
        self, max_devices: int, pods: Callable[[Version], tuple[int, int]], is_ready: Callable[[Version], bool]
    ) -> None:
        """pods: number of a member's pods now, and of those that terminate. is_ready: whether each stage has one that works."""
        self._max_devices = max_devices
        self._pods = pods
        self._is_ready = is_ready
        self._changed = threading.Condition()
        self._holders: dict[Version, _Holder] = {}

    def enter(self, version: Version, seconds: float) -> None:
        """Waits until the member has a grant and lets the request in. Call `leave` at its end.

        Raises NotReady if that takes longer than `seconds`, or if the member needs more devices than there are.
        """
        with self._changed:
            holder = self._holders.setdefault(version, _Holder(version))
            if holder.devices > self._max_devices:
                raise NotReady(f"member {version.member} needs {holder.devices} devices, and the fleet has {self._max_devices}")
            came = time.monotonic()
            holder.waiting.append(came)
            try:
                while True:
                    self._decide()
                    if holder.granted_at is not None and not holder.closed:
                        holder.in_flight += 1
                        return
                    left = came + seconds - time.monotonic()
                    if left <= 0:
                        raise NotReady(f"no device became free for member {version.member} in {seconds:g} s; ask again later")
                    self._changed.wait(min(left, _TICK_SECONDS))
            finally:
                holder.waiting.remove(came)

    def leave(self, version: Version) -> None:
        with self._changed:
            holder = self._holders[version]
            holder.in_flight -= 1
            holder.used_at = time.monotonic()
            self._changed.notify_all()

    def waits(self) -> dict[Version, tuple[int, float]]:
        """Of each member without a grant for its requests: how many wait, and since when the oldest, in time.monotonic()."""
        with self._changed:
            return {
                version: (len(holder.waiting), holder.waiting[0])
                for version, holder in self._holders.items()
                if holder.waiting and (holder.granted_at is None or holder.closed)
            }

    def forget(self, versions: Sequence[Version]) -> None:
        """Forgets versions that are gone, once their requests have ended. Their pods leave by themselves."""
        with self._changed:
            for version in versions:
                if (holder := self._holders.get(version)) is not None and not holder.in_flight and not holder.waiting:
                    del self._holders[version]

    def _decide(self) -> None:
        now = time.monotonic()
        by_name = {str(number): holder for number, holder in enumerate(self._holders.values())}
        for holder in by_name.values():
            if holder.starting_since is not None and self._is_ready(holder.version):
                holder.return_seconds, holder.starting_since = now - holder.starting_since, None
        loads = [
            MemberLoad(
                name,
                holder.devices,
                *self._pods(holder.version),
                holder.granted_at,
                holder.in_flight,
                holder.waiting[0] if holder.waiting and (holder.granted_at is None or holder.closed) else None,
                holder.used_at,
                holder.return_seconds,
            )
            for name, holder in by_name.items()
        ]
        decision = decide(loads, self._max_devices, now)
        for name in decision.revoke:
            by_name[name].granted_at = by_name[name].starting_since = None
        for name in decision.grant:
            holder = by_name[name]
            holder.granted_at = now
            holder.starting_since = None if self._is_ready(holder.version) else now
        for name, holder in by_name.items():
            holder.closed = name in decision.close
        if decision.grant:
            self._changed.notify_all()
