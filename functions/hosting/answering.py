"""Answers complete requests: decides which request a thread takes next, and gives connections back to the poller.

Threads of a pool answer clients. Probes on the clients' port have one thread, and the management port has another.
"""

import logging
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from functions.fairness.fair_shares import FairShares
from functions.hosting.connection import CONTINUE, ClientConnection, ReplyWriter, ServerLimits, client_gone
from functions.hosting.poller import ListeningPort, Poller
from functions.hosting.requests import (
    CLIENT_GONE,
    MANAGEMENT,
    BadRequest,
    BodyBudget,
    ClientClosed,
    RequestReader,
)
from functions.threads.pool import ThreadPool

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from functions.hosting.requests import Admit

_log = logging.getLogger(__name__)

PROBES: Final = ("/healthz", "/readyz")
# How long a thread that has answered waits for the connection's next request, while half of the threads are free. Handing the
# socket to the poller and back would wake two threads for each request.
NEXT_REQUEST_SECONDS: Final = 0.25
MAX_QUEUED: Final = 256  # complete requests that wait for a thread; more are refused

_MANAGEMENT_CONNECTIONS: Final = 32
# A request in hand cannot give way, so some threads stay free: a client gets one more only while it has less than this multiple
# of the free ones (dynamic thresholds, Choudhury and Hahne 1998). Alone it gets three quarters of all.
_MULTIPLE_OF_FREE: Final = 3


@dataclass(frozen=True, slots=True)
class Service:
    """A function's WSGI applications and their limits, which a Server runs."""

    application: "WSGIApplication"
    management: "WSGIApplication"  # probes on both ports, and all else on the management port; never blocks
    admit: "Admit"  # how many bytes of body a request may have, by its head
    threads: int  # requests of one client that are answered at the same time; a third more are kept for other clients
    request_bytes: int  # of all bodies in memory together


class Turns:
    """Hands complete requests to threads. Clients whose requests must wait take turns.

    Only the poller's thread calls its methods, except `mostly_free`. `start` hands a connection to a thread at once.
    """

    def __init__(self, threads: int, max_waiting: int, start: Callable[[ClientConnection], object]) -> None:
        self._threads = threads
        self._max_waiting = max_waiting
        self._start = start
        self._in_hand: FairShares[ClientConnection] = FairShares()
        self._waiting: FairShares[ClientConnection] = FairShares()

    def push(self, connection: ClientConnection) -> list[ClientConnection]:
        """Starts a complete request, or queues it.

        Returns the connections whose requests must be refused to make place for it.
        """
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
        """Frees the connection's thread, if it had one, and starts queued requests that may start now."""
        self._in_hand.remove(connection)
        while (client_id := next(filter(self._may_start, self._waiting.clients()), None)) is not None:
            self._begin(client_id, self._waiting.take(client_id))

    @property
    def mostly_free(self) -> bool:
        """Whether at most half of the threads have a request. Any thread may ask."""
        return 2 * self._in_hand.total <= self._threads

    def _may_start(self, client_id: str) -> bool:
        return self._in_hand.held[client_id] < _MULTIPLE_OF_FREE * (self._threads - self._in_hand.total)

    def _begin(self, client_id: str, connection: ClientConnection) -> None:
        self._in_hand.add(client_id, connection)
        self._start(connection)


class Answering:
    """Queues complete requests for pool threads, which run the function's applications and send the replies."""

    poller: Poller

    def __init__(self, service: Service, limits: ServerLimits) -> None:
        self._service = service
        self._limits = limits
        self._budget = BodyBudget(service.request_bytes)
        threads = threads_for(service.threads)
        self._clients = ThreadPool(threads, "request")
        self._turns = Turns(threads, MAX_QUEUED, lambda each: self._clients.submit(self._serve, each, self._answer_client))
        self._probes = ThreadPool(1, "probe")
        self._managers = ThreadPool(1, "management")

    def clients_port(self, host: str, listener: socket.socket, max_waiting: int) -> ListeningPort:
        def admit(environ: dict[str, Any]) -> int | None:
            return 0 if environ["PATH_INFO"] in PROBES else self._service.admit(environ)

        def dispatch(connection: ClientConnection) -> Iterable[ClientConnection]:
            return self._probe(self._probes, MAX_QUEUED, connection) if _is_probe(connection) else self._turns.push(connection)

        return ListeningPort(listener, max_waiting, self._readers(host, listener, admit), dispatch, self._turns.finished)

    def management_port(self, host: str, listener: socket.socket) -> ListeningPort:
        return ListeningPort(
            listener,
            _MANAGEMENT_CONNECTIONS,
            self._readers(host, listener, lambda _: 0, management=True),
            lambda connection: self._probe(self._managers, _MANAGEMENT_CONNECTIONS, connection),
        )

    def _probe(self, pool: ThreadPool, max_waiting: int, connection: ClientConnection) -> Iterable[ClientConnection]:
        """Queues a probe. Returns the connection if the probe is refused, because `max_waiting` probes wait already."""
        if len(pool.waiting) >= max_waiting:
            return (connection,)
        # The connection ends with the reply, which fits into the kernel's buffer of a new one: a client that reads slowly
        # cannot block the thread.
        pool.submit(self._serve, connection, partial(self._answer, application=self._service.management, keeps=False))
        return ()

    def _readers(
        self, host: str, listener: socket.socket, admit: "Admit", *, management: bool = False
    ) -> Callable[[tuple[str, int]], RequestReader]:
        """Returns a function that makes a connection's RequestReader from the client's address.

        `management` says whether `listener` is the management port.
        """
        base = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": host,
            "SERVER_PORT": str(listener.getsockname()[1]),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            MANAGEMENT: management,
        }
        return lambda client: RequestReader(
            admit, self._budget, base | {"REMOTE_ADDR": client[0], "REMOTE_PORT": str(client[1])}
        )

    def _serve(self, connection: ClientConnection, answer: Callable[[ClientConnection], bool]) -> None:
        """Calls `answer` with a connection, and gives the connection back to the poller, also after an error.

        `answer` returns whether the connection stays open.
        """
        try:
            keeps = answer(connection)
        except Exception:  # noqa: BLE001 - logged; a broken connection must not take its thread with it, nor count for ever
            _log.exception("a connection broke")
            keeps = False
        self.poller.take_back(connection, keeps=keeps)

    def _answer_client(self, connection: ClientConnection) -> bool:
        """Answers the requests of one connection, as long as each comes soon after the last.

        Returns whether the connection stays open.
        """
        while True:
            reader = connection.reader
            keeps = self._answer(connection, self._service.application, keeps=reader.keeps and not self.poller.stopping)
            if not keeps:
                if reader.unread:
                    connection.linger()
                return reader.unread
            try:
                more = connection.next_request()
                if not more and self._turns.mostly_free and not self.poller.stopping:
                    more = connection.receive_soon(NEXT_REQUEST_SECONDS)
            except BadRequest as error:
                return connection.refuse(error)
            except (ClientClosed, OSError):
                return False
            if not more or _is_probe(connection):
                return True

    def _answer(self, connection: ClientConnection, application: "WSGIApplication", *, keeps: bool) -> bool:
        """Answers a complete request. Returns whether the connection can be used again; it cannot if `keeps` is False."""
        environ = connection.reader.environ
        assert environ is not None
        if (body := connection.reader.streamed) is not None:  # the application receives it itself
            before = CONTINUE if connection.reader.expects_continue else b""
            body.connect(connection.sock, self._limits.transfer_seconds, self._limits.slowest_bytes_per_second, before)
        environ[CLIENT_GONE] = partial(client_gone, connection.sock)  # not the connection, which has the environ
        reply = ReplyWriter(connection.sock, environ, self._limits, keeps=keeps)
        try:
            reply.answer(application, environ)
        except OSError:  # the client is gone, or reads nothing
            return False
        return reply.keeps


def threads_for(one_client: int) -> int:
    """Returns how many threads are needed so that a single client may use `one_client` of them."""
    return one_client + one_client // _MULTIPLE_OF_FREE


def _is_probe(connection: ClientConnection) -> bool:
    environ = connection.reader.environ
    return environ is not None and environ["PATH_INFO"] in PROBES
