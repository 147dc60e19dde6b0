"""Who waits how: clients of the highest priority first, who take turns; and before them whoever returns."""

from collections import OrderedDict, deque
from collections.abc import Container, Iterator
from typing import Generic, Protocol, TypeVar


class OfClient(Protocol):
    @property
    def client_id(self) -> str: ...

    @property
    def priority(self) -> int: ...


W = TypeVar("W", bound=OfClient)


class FairQueue(Generic[W]):
    """First come, first served within a client; round robin between clients of one priority, and a higher one goes first. Who
    returns goes before all who are new."""

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

    def peek(self, but: Container[str] = ()) -> W | None:
        """The one whose turn it is, none of the clients in `but`."""
        returned = next((item for item in self._returned if item.client_id not in but), None)
        if returned is not None:
            return returned
        waiting = (items[0] for client_id, items in self._clients.items() if client_id not in but)
        return max(waiting, key=lambda item: item.priority, default=None)  # The first of several, whose turn it is.

    def pop(self, but: Container[str] = ()) -> W:
        """Takes out what `peek` says; its client goes to the end of the round. Raises IndexError when nobody waits."""
        item = self.peek(but)
        if item is None:
            raise IndexError("nobody waits")
        if item in self._returned:
            self._returned.remove(item)
            return item
        waiting = self._clients[item.client_id]
        waiting.popleft()
        if waiting:
            self._clients.move_to_end(item.client_id)
        else:
            del self._clients[item.client_id]
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
