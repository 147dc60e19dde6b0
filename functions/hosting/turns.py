"""Which complete request is answered next: clients share the threads, and the places of requests that wait for one."""

from collections.abc import Callable
from typing import Final

from functions.fairness.fair_shares import FairShares
from functions.hosting.connection import ClientConnection

# A request in hand cannot give way, so some threads stay free: a client gets one more only while it has less than this multiple
# of the free ones (dynamic thresholds, Choudhury and Hahne 1998). Alone it gets three quarters of all.
_MULTIPLE_OF_FREE: Final = 3


def threads_for(one_client: int) -> int:
    """How many threads there must be so that one client alone can have `one_client` of them."""
    return one_client + one_client // _MULTIPLE_OF_FREE


class Turns:
    """Hands complete requests to threads; clients whose requests must wait take turns. The poller's thread calls all methods.

    start: hands a connection to a thread at once.
    """

    def __init__(self, threads: int, max_waiting: int, start: Callable[[ClientConnection], object]) -> None:
        self._threads = threads
        self._max_waiting = max_waiting
        self._start = start
        self._in_hand: FairShares[ClientConnection] = FairShares()
        self._waiting: FairShares[ClientConnection] = FairShares()

    def push(self, connection: ClientConnection) -> list[ClientConnection]:
        """Starts a complete request or lets it wait. Returns the connections whose requests give way and must be refused."""
        client_id = connection.reader.client_id
        if self._may_start(client_id):  # so nothing of this client waits
            self._begin(client_id, connection)
            return []
        yielding = self._waiting.make_room(client_id, 1, self._max_waiting)
        if yielding is None:
            return [connection]
        self._waiting.add(client_id, connection)
        return yielding

    def finished(self, connection: ClientConnection) -> None:
        """Frees the connection's thread, if it had one, and starts what may start now."""
        self._in_hand.remove(connection)
        while (client_id := next(filter(self._may_start, self._waiting.clients()), None)) is not None:
            self._begin(client_id, self._waiting.take(client_id))

    def _may_start(self, client_id: str) -> bool:
        return self._in_hand.held(client_id) < _MULTIPLE_OF_FREE * (self._threads - self._in_hand.total)

    def _begin(self, client_id: str, connection: ClientConnection) -> None:
        self._in_hand.add(client_id, connection)
        self._start(connection)
