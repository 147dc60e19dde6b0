"""The one thread that waits for all connections: takes them, reads whole requests, closes those that take too long."""

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from functions.hosting.connection import Connection
from functions.hosting.limits import Limits
from functions.hosting.request_reader import BadRequest, ClientClosed, RequestReader

_log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 0.5
"""Between looks at who has taken too long."""
_ACCEPTED_AT_ONCE: Final = 64
_NO_MORE_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Where connections of one kind come in."""

    def __init__(
        self,
        listener: socket.socket,
        most_waiting: int,
        read: Callable[[tuple[str, int]], RequestReader],
        takes: Callable[[Connection], bool],
        dispatch: Callable[[Connection], None],
    ) -> None:
        """read: makes a client's reader. takes: whether there is room for a whole request. dispatch: gets it, at once."""
        self.listener = listener
        self.most_waiting = most_waiting
        self.read = read
        self.takes = takes
        self.dispatch = dispatch
        self.waiting: dict[Connection, None] = {}
        """The one that has waited longest is first."""


class Poller:
    """`run` it in one thread; `take_back` and `stop` come from any."""

    def __init__(self, doors: Sequence[Door], limits: Limits) -> None:
        self._doors = doors
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._returned: deque[tuple[Connection, bool]] = deque()
        self._in_hand = 0
        self._checked_at = 0.0
        self.stopping = False

    def take_back(self, connection: Connection, *, keeps: bool) -> None:
        """From the thread that had it in hand."""
        self._returned.append((connection, keeps))
        self._wake_up()

    def stop(self) -> None:
        """Takes no connection any more, finishes what is begun, and lets `run` return. May be called by a signal's handler."""
        self.stopping = True
        self._wake_up()

    def run(self) -> None:
        """Until `stop`, and then until nothing is left, or for Limits.graceful_seconds."""
        self._selector.register(self._wake, selectors.EVENT_READ)
        for door in self._doors:
            door.listener.setblocking(False)
            self._selector.register(door.listener, selectors.EVENT_READ, door)
        while not self.stopping:
            self._turn()
        self._close_doors()
        end = time.monotonic() + self._limits.graceful_seconds
        while (self._in_hand or any(door.waiting for door in self._doors)) and time.monotonic() < end:
            self._turn()
        self._selector.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(_CHECK_SECONDS):
            if isinstance(key.data, Door):
                self._accept(key.data)
            elif key.data is not None:
                if key.data in key.data.door.waiting:  # Not closed by what came before it in this turn.
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

    def _accept(self, door: Door) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, client = door.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_MORE_FILES:
                    return  # It was gone before it was taken.
                if not self._close_longest_waiting(door):
                    _log.warning("no connection can be taken: %s", error.strerror)
                    return
                continue
            if len(door.waiting) >= door.most_waiting:
                self._close_longest_waiting(door)
            self._wait(Connection(sock, door.read(client[:2]), self._limits, door))

    def _wait(self, connection: Connection) -> None:
        connection.door.waiting[connection] = None
        self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def _leave(self, connection: Connection) -> None:
        del connection.door.waiting[connection]
        self._selector.unregister(connection.sock)

    def _close(self, connection: Connection) -> None:
        self._leave(connection)
        connection.close()

    def _receive(self, connection: Connection) -> None:
        try:
            complete = connection.receive()
        except BadRequest as error:
            self._refuse(connection, error)
        except (ClientClosed, OSError):
            self._close(connection)
        except Exception:  # noqa: BLE001 - logged; one connection must not take all others with it
            _log.exception("a connection broke")
            self._close(connection)
        else:
            if complete:
                self._take(connection)

    def _take(self, connection: Connection) -> None:
        if not connection.door.takes(connection):
            self._refuse(connection, BadRequest(503, "too many requests wait for a thread; send it again a little later"))
            return
        self._leave(connection)
        self._dispatch(connection)

    def _dispatch(self, connection: Connection) -> None:
        self._in_hand += 1
        connection.door.dispatch(connection)

    def _go_on(self, connection: Connection, keeps: bool) -> None:
        """A reply is out."""
        if not keeps:
            connection.close()
        elif connection.reader.complete and not connection.lingers:
            self._dispatch(connection)
        else:
            if self.stopping:
                connection.deadline = min(connection.deadline, time.monotonic() + self._limits.linger_seconds)
            self._wait(connection)

    def _refuse(self, connection: Connection, error: BadRequest) -> None:
        if not connection.refuse(error):
            self._close(connection)

    def _close_the_late(self, now: float) -> None:
        for door in self._doors:
            for connection in [each for each in door.waiting if each.deadline <= now]:
                if connection.reader.begun and not connection.lingers:
                    self._refuse(connection, BadRequest(408, "the request did not come in time"))
                else:
                    self._close(connection)

    def _close_longest_waiting(self, door: Door) -> bool:
        connection = next(iter(door.waiting), None)
        if connection is None:
            return False
        self._close(connection)
        return True

    def _close_doors(self) -> None:
        """Connections that wait are kept a little, for requests that are on their way (RFC 9112, section 9.6)."""
        end = time.monotonic() + self._limits.linger_seconds
        for door in self._doors:
            self._selector.unregister(door.listener)
            door.listener.close()
            for connection in door.waiting:
                if not connection.reader.begun:
                    connection.deadline = min(connection.deadline, end)

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)
