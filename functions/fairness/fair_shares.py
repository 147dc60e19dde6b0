"""How clients share a limited resource. docs/scheduling.md says where it is used."""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairShares(Generic[T]):
    """The items that clients hold of one limited resource, and which of them give way when it is full. Not thread-safe.

    A client alone may hold everything. When the resource is full, the client gives way that would hold most, the new amount
    included: if that is the one that asks, it is refused; another one loses its newest item. A client's only item is never
    taken for another client. So if all want more than there is, all get equal parts (longest queue drop, Suter et al. 1999).

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
        """All items, oldest first."""
        return iter(self._owners)

    def __contains__(self, item: T) -> bool:
        return item in self._owners

    def clients(self) -> Iterator[str]:
        """The clients that have items, in the order of their turns: see `take`."""
        return iter(self._items)

    def add(self, client_id: str, item: T, amount: int = 1) -> None:
        """Counts an item of a client, or `amount` more of one that is counted already. `make_room` comes before."""
        self._owners[item] = client_id
        items = self._items.setdefault(client_id, {})
        items[item] = items.get(item, 0) + amount
        self.held[client_id] += amount
        self.total += amount

    def move(self, client_id: str, item: T) -> None:
        """From now on counts an item for this client. It stays as old as it is."""
        before = self._owners[item]
        if before == client_id:
            return
        amount = self._items[before].pop(item)
        self._subtract(before, amount)
        self.add(client_id, item, amount)

    def fix(self, item: T) -> None:
        """From now on the item does not give way. It still counts. Does nothing if it is not counted."""
        if item in self._owners:
            self._fixed.add(item)

    def remove(self, item: T) -> None:
        """Counts an item no longer. Does nothing if it is not counted, for example because it has given way."""
        client_id = self._owners.pop(item, None)
        if client_id is None:
            return
        self._fixed.discard(item)
        amount = self._items[client_id].pop(item)
        self._subtract(client_id, amount)

    def take(self, client_id: str) -> T:
        """Removes and returns a client's oldest item. If it has more, it becomes the last of `clients`."""
        self._items[client_id] = self._items.pop(client_id)
        item = next(iter(self._items[client_id]))
        self.remove(item)
        return item

    def make_room(self, client_id: str, amount: int, capacity: int) -> list[T] | None:
        """Removes and returns the items that give way so that a client can have `amount` more. None: it is refused.

        capacity: of the resource at present, in the unit of the amounts. The caller frees what the items hold.
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
        """The item that gives way next. held: what each client holds after those in `chosen` have given way."""
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
