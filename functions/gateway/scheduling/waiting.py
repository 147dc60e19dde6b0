"""Sequences that hold no memory anywhere: in the queue, in the back-off before a replay, or refused by a full stage."""

import bisect
import math
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

from eventing.wire.control import HOLD_SECONDS
from functions.fairness.fair_shares import FairShares
from functions.gateway.scheduling.batching import IN_FLIGHT_PER_INSTANCE
from functions.gateway.scheduling.leases import Release
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.routes import Instance, Placement

AGEING_TURNS: Final = 4  # one in so many turns disregards priorities
_FIRST_BACK_OFF_SECONDS: Final = 0.02
_LONGEST_BACK_OFF_SECONDS: Final = 1.0
_OVERTAKE_FACTOR: Final = 4
_NEVER_FREE_TOKENS: Final = 9_999_999_999  # no stage has so many, so that it holds its reply for HOLD_SECONDS


@dataclass(eq=False, slots=True)
class Entering:
    """A request that an API reads before it submits its sequences. It takes a place in the queue meanwhile."""

    gave_way: bool = False  # it lost its place to another client's request


class FairQueue:
    """First come, first served within a client; clients of one priority take turns, higher priorities go first. What a client
    asks in the background, with a lower priority, takes turns as if another client asked it.

    Every AGEING_TURNS-th turn goes to the client that has waited longest for one, so that a low priority does not starve.
    Sequences that were admitted before and come back go before all new ones.
    """

    def __init__(self) -> None:
        self.places: FairShares[Sequence | Entering] = FairShares()  # new sequences, and requests that become some
        # New sequences, by client and priority; the one next in turn is first.
        self._clients: OrderedDict[tuple[str, int], deque[Sequence]] = OrderedDict()
        self.returned: deque[Sequence] = deque()  # admitted before: they go first, and use no turn of their client again
        self._turns = 0

    def __len__(self) -> int:
        return len(self.returned) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, in no particular order."""
        yield from self.returned
        for waiting in self._clients.values():
            yield from waiting

    def push(self, sequence: Sequence) -> None:
        self._clients.setdefault(sequence.prompt.turn, deque()).append(sequence)
        self.places.add(sequence.prompt.client_id, sequence)

    def peek(self, most_tokens: float = math.inf) -> Sequence | None:
        """The sequence that is next, not removed. None: there is none.

        most_tokens: sequences that need more memory are passed over.
        """

        def first(waiting: Iterable[Sequence]) -> Sequence | None:
            return next((sequence for sequence in waiting if sequence.reserve_tokens <= most_tokens), None)

        if (returned := first(self.returned)) is not None:
            return returned
        firsts = [sequence for waiting in self._clients.values() if (sequence := first(waiting)) is not None]
        if self._turns % AGEING_TURNS == AGEING_TURNS - 1:
            return next(iter(firsts), None)
        return max(firsts, key=lambda sequence: sequence.prompt.priority, default=None)  # among equals the client next in turn

    def take(self, sequence: Sequence) -> None:
        """Removes a sequence that `peek` returned. If it was never admitted before, its client goes to the end of the round."""
        is_new = sequence not in self.returned
        self.remove(sequence)
        self._turns += is_new
        if is_new and sequence.prompt.turn in self._clients:
            self._clients.move_to_end(sequence.prompt.turn)

    def remove(self, sequence: Sequence) -> bool:
        """Removes a sequence if it is in the queue. Returns whether it was."""
        if sequence in self.returned:
            self.returned.remove(sequence)
            return True
        waiting = self._clients.get(sequence.prompt.turn, deque())
        if sequence not in waiting:
            return False
        waiting.remove(sequence)
        self.places.remove(sequence)
        if not waiting:
            del self._clients[sequence.prompt.turn]
        return True


class MemoryBacklog:
    """Sequences that a stage refused for lack of memory, oldest first.

    Others that fit may overtake one until they have got `_OVERTAKE_FACTOR` times the memory that it needs. Then all wait for
    it, so that long prompts do not starve.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.retry_at = 0.0  # in time.monotonic()
        self._back_off_seconds = _FIRST_BACK_OFF_SECONDS

    def add(self, sequence: Sequence) -> None:
        self._not_overtaken(sequence)
        bisect.insort(self.sequences, sequence, key=lambda other: other.number)

    def overtaking_tokens(self, besides: Sequence | None = None) -> float:
        """The most memory that a sequence may ask for before those in the backlog get theirs; infinity if it is empty.

        besides: a sequence of the backlog that is not looked at, because it is the one that would overtake.
        """
        allowances = [
            _OVERTAKE_FACTOR * sequence.reserve_tokens - sequence.overtaken_tokens
            for sequence in self.sequences
            if sequence is not besides
        ]
        return min(allowances, default=math.inf)

    def overtaken(self, by: Sequence) -> None:
        """Counts that `by` asks for memory before the sequences in the backlog: each may be overtaken by a limited amount.

        It counts no more once `by` is refused and added to the backlog. Two micro-batches that ask at once can refuse each
        other at every stage, and nobody gets what they asked for.
        """
        self._not_overtaken(by)
        by.overtook = tuple(self.sequences)
        for sequence in by.overtook:
            sequence.overtaken_tokens += by.reserve_tokens

    def _not_overtaken(self, by: Sequence) -> None:
        for sequence in by.overtook:
            sequence.overtaken_tokens -= by.reserve_tokens
        by.overtook = ()

    def refused(self) -> None:
        """Sets a back-off after a stage refused memory, each time a longer one (`retry_at`).

        Jitter keeps two gateways from colliding again and again.
        """
        self.retry_at = time.monotonic() + self._back_off_seconds * random.uniform(0.5, 1.5)
        self._back_off_seconds = min(_LONGEST_BACK_OFF_SECONDS, 2 * self._back_off_seconds)

    def granted(self) -> None:
        """Resets the length of the back-off. Call it when stages have granted a sequence its memory."""
        self._back_off_seconds = _FIRST_BACK_OFF_SECONDS

    def freed(self) -> None:
        """Ends and resets the back-off. Call it when a stage may have freed memory."""
        self.retry_at = 0.0
        self._back_off_seconds = _FIRST_BACK_OFF_SECONDS


class BacklogSignals:
    """Requests that stages hold open, so that their autoscalers see what waits in the gateway: for memory, or for compute.

    A pod that is full of long answers may have a single event in flight, or none, and prompts are held back by the narrowest
    stage. Autoscalers would add no pod, or one stage after the other. So instances of each stage that lacks memory or instances
    get releases without rows, to which they reply only when they have memory, or after HOLD_SECONDS.
    """

    def __init__(self) -> None:
        self._open: dict[Release, float] = {}  # when each was sent, in time.monotonic()
        self._not_before: dict[Instance, float] = {}  # next request to an instance that holds no reply, in time.monotonic()

    def send(self, backlog: MemoryBacklog, lacking: Items[int], placement: Placement, now: float) -> list[Release]:
        """Returns the releases to send now, to all stages at once.

        At a stage that lacks memory for the oldest sequence of the backlog as many are open as the backlog has sequences; at
        one that lacks instances, IN_FLIGHT_PER_INSTANCE for each of them; and at most IN_FLIGHT_PER_INSTANCE at each instance.
        lacking: instances that each stage lacks. now: in time.monotonic().
        """
        self._not_before = {instance: moment for instance, moment in self._not_before.items() if moment > now}
        needed = backlog.sequences[0].reserve_tokens if backlog.sequences else 0
        sent: list[Release] = []
        for stage, instances_lacking in enumerate(lacking):
            count, tokens = IN_FLIGHT_PER_INSTANCE * instances_lacking, _NEVER_FREE_TOKENS
            if needed and all(instance.lacks(needed) for instance in placement.usable(stage)):
                count, tokens = max(count, len(backlog.sequences)), needed
            if not count:
                continue
            wanted = placement.usable(stage) * IN_FLIGHT_PER_INSTANCE
            missing = Counter(wanted[:count]) - Counter(release.instance for release in self._open)
            sent += [Release(instance, (), tokens) for instance in missing.elements() if instance not in self._not_before]
        self._open |= dict.fromkeys(sent, now)
        return sent

    def replied(self, release: Release, backlog: MemoryBacklog, now: float) -> bool:
        """Records that `release` was answered or has failed, and ends the back-off if the instance has memory now.

        Returns whether `release` was one of these signals; False for any other.
        """
        sent_at = self._open.pop(release, None)
        if sent_at is None:
            return False
        free_tokens = release.instance.free_tokens
        if free_tokens is not None and free_tokens >= release.awaited_tokens:
            backlog.freed()
        else:
            self._not_before[release.instance] = sent_at + HOLD_SECONDS
        return True


class WaitingSequences:
    """All sequences that wait: in the queue, in the back-off before a replay, or in the memory backlog."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.backing_off: list[Sequence] = []  # replays whose time has not come
        self.backlog = MemoryBacklog()

    def __len__(self) -> int:
        return len(self.queue) + len(self.backing_off) + len(self.backlog.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order."""
        yield from self.queue
        yield from self.backing_off
        yield from self.backlog.sequences

    @property
    def admitted_before(self) -> int:
        """How many of them were in a micro-batch already."""
        return len(self.queue.returned) + len(self.backing_off) + len(self.backlog.sequences)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence from the queue, the back-off or the backlog. Does nothing if it is in none of them."""
        if not self.queue.remove(sequence):
            for waiting in (self.backing_off, self.backlog.sequences):
                if sequence in waiting:
                    waiting.remove(sequence)
