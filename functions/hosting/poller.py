"""The thread that waits for all connections: accepts them, reads requests until they are complete, and closes slow ones."""

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from functions.fairness.fair_shares import FairShares
from functions.hosting.connection import ClientConnection, ServerLimits
from functions.hosting.requests import BadRequest, ClientClosed, RequestReader

_log = logging.getLogger(__name__)

LAST_REPLIES_SECONDS: Final = 5.0  # after the drain, for errors that say that it was too short
_CHECK_SECONDS: Final = 0.5  # between two looks for connections past their deadline
_ACCEPTED_AT_ONCE: Final = 64
_NO_MORE_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False, slots=True)
class ListeningPort:
    """A listening socket, and the functions with which the poller handles its connections."""

    listener: socket.socket
    max_waiting: int  # limit of connections without a complete request
    read: Callable[[tuple[str, int]], RequestReader]  # makes the reader for a client's address
    # Queues a complete request for a thread. Returns connections whose requests are refused with 503 because too many wait.
    dispatch: Callable[[ClientConnection], Iterable[ClientConnection]]
    finished: Callable[[ClientConnection], object] = lambda _: None  # called when a dispatched connection comes back
    waiting: FairShares[ClientConnection] = field(default_factory=lambda: FairShares(oldest_first=True))  # for a whole request


class Poller:
    """Waits for all connections in one thread, the thread that calls `run`. Any thread may call `take_back` and `stop`."""

    def __init__(self, ports: Sequence[ListeningPort], limits: ServerLimits) -> None:
        self._ports = ports
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._returned: deque[tuple[ClientConnection, bool]] = deque()
        self._in_hand = 0
        self._checked_at = 0.0
        self.stopping = False

    def take_back(self, connection: ClientConnection, *, keeps: bool) -> None:
        """Returns a connection to the poller after its request was answered.

        If not `keeps`, the poller closes the connection.
        """
        self._returned.append((connection, keeps))
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Stops accepting connections. `run` returns after the requests that have begun. A signal handler may call it."""
        self.stopping = True
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serves until `stop` is called, and then finishes the remaining connections. Call `finish` after it.

        After `stop` it returns when no connection remains, or after ServerLimits.graceful_seconds.
        """
        self._selector.register(self._wake, selectors.EVENT_READ)
        for port in self._ports:
            port.listener.setblocking(False)
            self._selector.register(port.listener, selectors.EVENT_READ, port)
        while not self.stopping:
            self._turn()
        self._close_ports()
        end = time.monotonic() + self._limits.graceful_seconds
        while (self._in_hand or any(port.waiting for port in self._ports)) and time.monotonic() < end:
            self._turn()

    def finish(self) -> None:
        """Waits at most LAST_REPLIES_SECONDS for replies that are still being sent, and closes the poller."""
        end = time.monotonic() + LAST_REPLIES_SECONDS
        while self._in_hand and time.monotonic() < end:
            self._turn()
        self._selector.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(_CHECK_SECONDS):
            if isinstance(key.data, ListeningPort):
                self._accept(key.data)
            elif key.data is not None:
                if key.data in key.data.port.waiting:  # not closed earlier in this loop
                    self._receive(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
        while self._returned:
            self._in_hand -= 1
            self._go_on(*self._returned.popleft())
        now = time.monotonic()
        if now - self._checked_at >= _CHECK_SECONDS:
            self._checked_at = now
            self._close_the_late(now)

    def _accept(self, port: ListeningPort) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, client = port.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_MORE_FILES:
                    return  # it was gone before it was accepted
                if not self._close_waiting(port, "", len(port.waiting)):
                    _log.warning("no connection can be accepted: %s", error.strerror)
                    return
                continue
            connection = ClientConnection(sock, port.read(client[:2]), self._limits, port)
            self._close_waiting(port, connection.reader.client_id, port.max_waiting)
            self._wait(connection)

    def _wait(self, connection: ClientConnection) -> None:
        connection.port.waiting.add(connection.reader.client_id, connection)
        self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def _leave(self, connection: ClientConnection) -> None:
        connection.port.waiting.remove(connection)
        self._selector.unregister(connection.sock)

    def _close(self, connection: ClientConnection) -> None:
        self._leave(connection)
        connection.sock.close()

    def _receive(self, connection: ClientConnection) -> None:
        try:
            complete = connection.receive()
        except BadRequest as error:
            if not connection.refuse(error):
                self._close(connection)
        except (ClientClosed, OSError):
            self._close(connection)
        except Exception:  # noqa: BLE001 - logged; one connection must not take all others with it
            _log.exception("a connection broke")
            self._close(connection)
        else:
            if complete:
                self._leave(connection)
                self._dispatch(connection)
            else:
                connection.port.waiting.move(connection.reader.client_id, connection)

    def _dispatch(self, connection: ClientConnection) -> None:
        self._in_hand += 1
        for refused in connection.port.dispatch(connection):
            self._in_hand -= 1
            if refused.refuse(BadRequest(503, "too many requests wait for a thread; send it again a little later")):
                self._wait(refused)
            else:
                refused.sock.close()

    def _go_on(self, connection: ClientConnection, keeps: bool) -> None:
        """Handles a returned connection: closes it, dispatches its next request if that is complete, or waits for the rest."""
        connection.port.finished(connection)
        if not keeps:
            connection.sock.close()
        elif connection.reader.complete and not connection.lingers:
            self._dispatch(connection)
        else:
            if self.stopping:
                connection.deadline = min(connection.deadline, time.monotonic() + self._limits.linger_seconds)
            self._wait(connection)

    def _close_the_late(self, now: float) -> None:
        for port in self._ports:
            for connection in [each for each in port.waiting if each.deadline <= now or each.reader.gave_way]:
                if connection.reader.gave_way:
                    self._receive(connection)
                    continue
                late = BadRequest(408, "the request did not come in time")
                if not connection.reader.begun or connection.lingers or not connection.refuse(late):
                    self._close(connection)

    def _close_waiting(self, port: ListeningPort, client_id: str, max_waiting: int) -> bool:
        """Closes waiting connections until a client may have one more. Returns whether it closed any.

        It closes those of the client that has most, the longest waiting first.
        """
        closed = port.waiting.make_room(client_id, 1, max_waiting) or []
        for connection in closed:
            self._selector.unregister(connection.sock)
            connection.sock.close()
        return bool(closed)

    def _close_ports(self) -> None:
        """Closes the listening sockets.

        Waiting connections stay open for linger_seconds, because requests may be on their way (RFC 9112, section 9.6).
        """
        end = time.monotonic() + self._limits.linger_seconds
        for port in self._ports:
            self._selector.unregister(port.listener)
            port.listener.close()
            for connection in port.waiting:
                if not connection.reader.begun:
                    connection.deadline = min(connection.deadline, end)
