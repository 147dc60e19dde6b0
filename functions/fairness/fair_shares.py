"""Shares a limited resource fairly among clients. docs/scheduling.md says where it is used."""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairShares(Generic[T]):
    """Counts the items that each client holds of one limited resource, and chooses items that give way when it is full.

    Not thread-safe. A client alone may hold everything. When the resource is full, the client that would hold most gives way;
    the new amount counts. If that is the client that asks, its request is refused. If it is another client, that client loses
    its newest item, but never its only one. So if all clients want more than there is, all get equal parts (longest queue drop,
    Suter et al. 1999).

    With `oldest_first` nobody is refused: the client that would hold most loses its oldest item, even its only one.
    """

    def __init__(self, *, oldest_first: bool = False) -> None:
        self.total = 0  # of all amounts
        self._oldest_first = oldest_first
        self._owners: dict[T, str] = {}  # client of each item, oldest first
        self._items: dict[str, dict[T, int]] = {}  # amounts of each client's items, oldest first
        self.held: Counter[str] = Counter()  # sum of each client's amounts
        self._fixed: set[T] = set()

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[T]:
        """Yields all items, oldest first."""
        return iter(self._owners)

    def __contains__(self, item: T) -> bool:
        return item in self._owners

    def clients(self) -> Iterator[str]:
        """Yields the clients that have items, in the order of their turns. `take` moves a client to the end of this order."""
        return iter(self._items)

    def add(self, client_id: str, item: T, amount: int = 1) -> None:
        """Counts a new item for a client, or adds `amount` to an item that is counted already. Call `make_room` before."""
        self._owners[item] = client_id
        items = self._items.setdefault(client_id, {})
        items[item] = items.get(item, 0) + amount
        self.held[client_id] += amount
        self.total += amount

    def move(self, client_id: str, item: T) -> None:
        """From now on counts an item for this client. The item keeps its age for `oldest_first`."""
        before = self._owners[item]
        if before == client_id:
            return
        amount = self._items[before].pop(item)
        self._subtract(before, amount)
        self.add(client_id, item, amount)

    def fix(self, item: T) -> None:
        """Protects an item: from now on it does not give way. It still counts. Does nothing if the item is not counted."""
        if item in self._owners:
            self._fixed.add(item)

    def remove(self, item: T) -> None:
        """Stops counting an item. Does nothing if the item is not counted, for example because it has given way."""
        client_id = self._owners.pop(item, None)
        if client_id is None:
            return
        self._fixed.discard(item)
        amount = self._items[client_id].pop(item)
        self._subtract(client_id, amount)

    def take(self, client_id: str) -> T:
        """Removes and returns a client's oldest item.

        If the client has more items, its next turn comes after all other clients'.
        """
        self._items[client_id] = self._items.pop(client_id)
        item = next(iter(self._items[client_id]))
        self.remove(item)
        return item

    def make_room(self, client_id: str, amount: int, capacity: int) -> list[T] | None:
        """Removes and returns the items that must give way so that a client can have `amount` more.

        Returns None if the client is refused. `capacity` is the resource's present size, in the same unit as the amounts. The
        caller frees what the returned items hold.
        """
        missing = self.total + amount - capacity
        if missing <= 0:
            return []
        held = self.held.copy()
        held[client_id] += amount
        yielding: list[T] = []
        while missing > 0:
            item = self._next_to_yield(client_id, held, yielding)
            if item is None:
                return None
            owner = self._owners[item]
            size = self._items[owner][item]
            held[owner] -= size
            missing -= size
            yielding.append(item)
        for item in yielding:
            self.remove(item)
        return yielding

    def _subtract(self, client_id: str, amount: int) -> None:
        self.total -= amount
        self.held[client_id] -= amount
        if not self._items[client_id]:
            del self._items[client_id], self.held[client_id]

    def _next_to_yield(self, client_id: str, held: Counter[str], chosen: list[T]) -> T | None:
        """Returns the item that gives way next; None if no item may.

        `held` is what clients hold without the items in `chosen`.
        """
        if self._oldest_first:
            candidates = [item for item in self._owners if item not in self._fixed and item not in chosen]
            return max(candidates, key=lambda item: held[self._owners[item]], default=None)  # of equals the first
        for owner, amount in held.most_common():
            if amount <= held[client_id]:
                return None
            left = [item for item in self._items[owner] if item not in chosen]
            newest = next((item for item in reversed(left) if item not in self._fixed), None)
            if len(left) > 1 and newest is not None:
                return newest
        return None
