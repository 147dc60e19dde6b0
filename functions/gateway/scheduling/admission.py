"""How many micro-batches may be in flight, into how many the sequences are divided, and who waits how."""

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Numbers
from typing import Final, Generic, Protocol, TypeVar

IN_FLIGHT_PER_INSTANCE: Final = 2
"""Micro-batches at each ready instance of the narrowest stage: above Knative's target, so that it grows under a backlog."""


class Waiting(Protocol):
    @property
    def client_id(self) -> str: ...


W = TypeVar("W", bound=Waiting)


def micro_batches_allowed(ready_instances: Numbers[int], service_seconds: Numbers[float]) -> int:
    """Micro-batches that may be in flight, at least one for each stage.

    ready_instances: per stage, how many take work; 0: unknown. service_seconds: per stage, of a step that does not wait;
    where one is 0, all are taken to be alike. The narrowest stage has the most seconds per instance. By Little's law its
    rate times the seconds of a whole round is what keeps it busy, and twice that is two at each of its instances, those on
    their way through the other stages not counted. Two per instance in the whole pipeline would leave it with little more
    than one, which is below the autoscaler's target: it would never grow (docs/scheduling.md has the numbers).
    """
    instances = [max(1, count) for count in ready_instances]
    seconds = service_seconds if all(service_seconds) else [1.0] * len(instances)
    rate = min(count / each for count, each in zip(instances, seconds, strict=True))
    return max(len(instances), math.ceil(IN_FLIGHT_PER_INSTANCE * rate * sum(seconds) - 1e-9))


def micro_batches_wanted(sequences: int, stages_at_once: int, most_sequences: int, allowed: int) -> int:
    """Into how many micro-batches so many sequences are divided: one for each stage that can compute at the same time first,
    then full ones, as many as allowed."""
    return min(sequences, allowed, max(stages_at_once, math.ceil(sequences / most_sequences)))


class FairQueue(Generic[W]):
    """First come, first served within a client; round robin between clients. Who returns goes before all who are new."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[W]] = OrderedDict()
        self._returned: deque[W] = deque()

    def __len__(self) -> int:
        return len(self._returned) + sum(len(waiting) for waiting in self._clients.values())

    def __iter__(self) -> Iterator[W]:
        """All who wait, in no particular order."""
        yield from self._returned
        for waiting in self._clients.values():
            yield from waiting

    def push(self, item: W) -> None:
        self._clients.setdefault(item.client_id, deque()).append(item)

    def push_returned(self, item: W) -> None:
        """For one that was taken out before: it had its turn already."""
        self._returned.append(item)

    def peek(self) -> W | None:
        if self._returned:
            return self._returned[0]
        return next((waiting[0] for waiting in self._clients.values()), None)

    def pop(self) -> W:
        """The one whose turn it is; its client goes to the end of the round. Raises IndexError when nobody waits."""
        if self._returned:
            return self._returned.popleft()
        if not self._clients:
            raise IndexError("nobody waits")
        client_id, waiting = next(iter(self._clients.items()))
        item = waiting.popleft()
        if waiting:
            self._clients.move_to_end(client_id)
        else:
            del self._clients[client_id]
        return item

    def remove(self, item: W) -> bool:
        """Takes `item` out of the queue; False where it is not in it."""
        if item in self._returned:
            self._returned.remove(item)
            return True
        waiting = self._clients.get(item.client_id, deque())
        if item not in waiting:
            return False
        waiting.remove(item)
        if not waiting:
            del self._clients[item.client_id]
        return True
