"""Sequences that wait without memory at any stage: in the queue, in the back-off before a replay, or in the memory backlog."""

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
    """A request that an API still reads, before it submits the request's sequences. The request has a place in the queue."""

    gave_way: bool = False  # it lost its place to another client's request


class FairQueue:
    """A queue of sequences that is fair between clients.

    Higher priorities go first. Clients of equal priority take turns. Each client's sequences are served in the order in which
    they came. If a client also has sequences of a lower priority, these take turns as if they were another client's.

    Every AGEING_TURNS-th turn goes to the client that has waited longest for a turn, so that low priorities do not starve.
    Sequences that come back after they were admitted go before all new ones.
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
        """Yields all sequences, in no particular order."""
        yield from self.returned
        for waiting in self._clients.values():
            yield from waiting

    def push(self, sequence: Sequence) -> None:
        self._clients.setdefault(sequence.prompt.turn, deque()).append(sequence)
        self.places.add(sequence.prompt.client_id, sequence)

    def peek(self, most_tokens: float = math.inf) -> Sequence | None:
        """Returns the next sequence without removing it, or None if there is none.

        Sequences that need more memory than `most_tokens` are passed over.
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
        """Removes a sequence that `peek` returned.

        If the sequence was never admitted before, its client goes to the end of the round.
        """
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

    Other sequences that fit may overtake a sequence of the backlog until they have got `_OVERTAKE_FACTOR` times the memory that
    it needs. Then all others wait for that sequence, so that long prompts do not starve.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.retry_at = 0.0  # in time.monotonic()
        self._back_off_seconds = _FIRST_BACK_OFF_SECONDS

    def add(self, sequence: Sequence) -> None:
        self._not_overtaken(sequence)
        bisect.insort(self.sequences, sequence, key=lambda other: other.number)

    def overtaking_tokens(self, besides: Sequence | None = None) -> float:
        """Returns the most memory, in tokens, that a sequence may ask for before the backlog. Infinity if the backlog is empty.

        `besides` is the sequence of the backlog that would overtake the others. It is not counted.
        """
        allowances = [
            _OVERTAKE_FACTOR * sequence.reserve_tokens - sequence.overtaken_tokens
            for sequence in self.sequences
            if sequence is not besides
        ]
        return min(allowances, default=math.inf)

    def overtaken(self, by: Sequence) -> None:
        """Counts that `by` asks for memory before the sequences in the backlog. Each may be overtaken by a limited amount.

        The count is undone if `by` is refused and added to the backlog. Two micro-batches that ask at once can refuse each
        other at every stage, so that neither gets memory.
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
        """Sets `retry_at` after a stage refused memory. Each refusal makes the back-off longer, up to a limit.

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
    """Requests that instances hold open, so that their autoscalers see the sequences that wait in the gateway.

    A pod that is full of long answers may have a single event in flight, or none. And the narrowest stage holds prompts back
    from the others. So autoscalers would add no pod, or add pods to one stage after the other.

    Therefore instances of each stage that lacks memory or instances get releases without rows. They reply to these only when
    they have memory, or after HOLD_SECONDS.
    """

    def __init__(self) -> None:
        self._open: dict[Release, float] = {}  # when each was sent, in time.monotonic()
        self._not_before: dict[Instance, float] = {}  # next request to an instance that holds no reply, in time.monotonic()

    def send(self, backlog: MemoryBacklog, lacking: Items[int], placement: Placement, now: float) -> list[Release]:
        """Returns the releases to send now, to all stages at once, in addition to those that are still open.

        A stage may lack memory for the oldest sequence of the backlog. Then as many releases are open there as the backlog has
        sequences. A stage may lack instances. Then IN_FLIGHT_PER_INSTANCE releases are open for each lacking instance. At most
        IN_FLIGHT_PER_INSTANCE are open at each instance. `lacking` has the number of lacking instances per stage. `now` is in
        time.monotonic().
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
        """Records that `release` was answered or has failed. Returns whether `release` is one of these signals.

        If the instance has the awaited memory now, ends the back-off of `backlog`.
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
        """Yields all waiting sequences, in no particular order."""
        yield from self.queue
        yield from self.backing_off
        yield from self.backlog.sequences

    @property
    def admitted_before(self) -> int:
        """How many of the waiting sequences were in a micro-batch before."""
        return len(self.queue.returned) + len(self.backing_off) + len(self.backlog.sequences)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence from the queue, the back-off or the backlog. Does nothing if it is in none of them."""
        if not self.queue.remove(sequence):
            for waiting in (self.backing_off, self.backlog.sequences):
                if sequence in waiting:
                    waiting.remove(sequence)
