"""Serves a function over HTTP from this one process: the poller's thread reads requests, pool threads answer them.

There is no parent process: a signal reaches the server itself, and the platform sees when it dies. A thread gets a request only
once it is complete, so clients that send slowly hold a connection and no thread (docs/log.md says what other servers did).
Probes have a thread of their own on the clients' port, and the management port has one.
"""

import logging
import resource
import signal
import socket
import threading
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
    base_environ,
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

_BACKLOG: Final = 2048
_MANAGEMENT_CONNECTIONS: Final = 32
_MAX_QUEUED: Final = 256  # complete requests that wait for a thread; more are refused
_MIN_CONNECTIONS: Final = 16
_OTHER_FILES: Final = 512  # file descriptors for connections to stages and the store, and for libraries
# A request in hand cannot give way, so some threads stay free: a client gets one more only while it has less than this multiple
# of the free ones (dynamic thresholds, Choudhury and Hahne 1998). Alone it gets three quarters of all.
_MULTIPLE_OF_FREE: Final = 3


@dataclass(frozen=True, slots=True)
class Service:
    """A function's WSGI applications and its limits, which a Server runs."""

    application: "WSGIApplication"
    management: "WSGIApplication"  # probes on both ports, and all else on the management port; never blocks
    admit: "Admit"  # how many bytes of body a request may have, by its head
    threads: int  # requests of one client that are answered at the same time; a third more are kept for other clients
    request_bytes: int  # of all bodies in memory together


class Server:
    """A function's HTTP server.

    It listens from construction on, so that requests wait rather than fail while the application starts.
    """

    def __init__(self, host: str, port: int, management_port: int, limits: ServerLimits | None = None) -> None:
        """A port of 0 lets the operating system choose one. Raises OSError, which names a port that cannot be listened on."""
        self._limits = limits or ServerLimits()
        self._listener = listen(host, port)
        self._management_listener = listen(host, management_port)
        self.port, self.management_port = _port(self._listener), _port(self._management_listener)
        self._host = host
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._status: int | None = None

    def run(self, service: Service, on_stop: Callable[[], None], close: Callable[[], None]) -> int:
        """Serves until SIGTERM, SIGINT or `stop`; then calls `on_stop` and finishes requests in hand. Main thread only.

        `on_stop` runs in a thread of its own. close: called when all requests are finished, or ServerLimits.graceful_seconds
        have passed. It makes those in hand fail; their replies are awaited. Returns the exit status: 0, or that of `stop`.
        """
        answering = _Answering(service, self._limits)
        waiting = _connections_allowed(self._limits.waiting_connections, threads_for(service.threads) + _MAX_QUEUED)
        poller = Poller(
            [
                answering.clients_port(self._host, self._listener, waiting),
                answering.management_port(self._host, self._management_listener),
            ],
            self._limits,
        )
        answering.poller = poller

        def stop(*_: object) -> None:
            if not poller.stopping:
                poller.stop()
                # In a thread: a signal's handler may interrupt code that holds the locks `on_stop` needs.
                threading.Thread(target=on_stop, name="on-stop", daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        with self._lock:
            self._stop = stop
            stopped_before = self._status is not None
        if stopped_before:
            stop()
        try:
            poller.run()
        finally:
            close()
        poller.finish()
        return self._status or 0

    def stop(self, status: int) -> None:
        """Ends `run` as SIGTERM would; `run` then returns `status`. May be called from any thread, also before `run`."""
        with self._lock:
            self._status = status
            stop = self._stop
        if stop is not None:
            stop()


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


class _Answering:
    """Queues complete requests for pool threads, which run the function's applications and send the replies."""

    poller: Poller

    def __init__(self, service: Service, limits: ServerLimits) -> None:
        self._service = service
        self._limits = limits
        self._budget = BodyBudget(service.request_bytes)
        self._clients = ThreadPool(threads_for(service.threads), "request")
        self._probes = ThreadPool(1, "probe")
        self._managers = ThreadPool(1, "management")

    def clients_port(self, host: str, listener: socket.socket, max_waiting: int) -> ListeningPort:
        def admit(environ: dict[str, Any]) -> int | None:
            return 0 if environ["PATH_INFO"] in PROBES else self._service.admit(environ)

        turns = Turns(
            threads_for(self._service.threads),
            _MAX_QUEUED,
            lambda connection: self._clients.submit(self._serve, connection, self._answer_client),
        )

        def dispatch(connection: ClientConnection) -> Iterable[ClientConnection]:
            return self._probe(self._probes, _MAX_QUEUED, connection) if _is_probe(connection) else turns.push(connection)

        return ListeningPort(listener, max_waiting, self._readers(host, listener, admit), dispatch, turns.finished)

    def management_port(self, host: str, listener: socket.socket) -> ListeningPort:
        return ListeningPort(
            listener,
            _MANAGEMENT_CONNECTIONS,
            self._readers(host, listener, lambda _: 0, management=True),
            lambda connection: self._probe(self._managers, _MANAGEMENT_CONNECTIONS, connection),
        )

    def _probe(self, pool: ThreadPool, max_waiting: int, connection: ClientConnection) -> Iterable[ClientConnection]:
        """Queues a probe. Returns its connection if it is refused because `max_waiting` wait already."""
        if pool.waiting >= max_waiting:
            return (connection,)
        # The connection ends with the reply, which fits into the kernel's buffer of a new one: a client that reads slowly
        # cannot block the thread.
        pool.submit(self._serve, connection, partial(self._answer, application=self._service.management, keeps=False))
        return ()

    def _readers(
        self, host: str, listener: socket.socket, admit: "Admit", *, management: bool = False
    ) -> Callable[[tuple[str, int]], RequestReader]:
        """Returns a function that makes the request reader of a client's connection from the client's address.

        management: whether `listener` is the management port.
        """
        port = _port(listener)
        return lambda client: RequestReader(admit, self._budget, base_environ(host, port, client) | {MANAGEMENT: management})

    def _serve(self, connection: ClientConnection, answer: Callable[[ClientConnection], bool]) -> None:
        """Answers on a connection and gives it back to the poller, also after an error.

        answer: returns whether the connection stays open.
        """
        try:
            keeps = answer(connection)
        except Exception:  # noqa: BLE001 - logged; a broken connection must not take its thread with it, nor count for ever
            _log.exception("a connection broke")
            keeps = False
        self.poller.take_back(connection, keeps=keeps)

    def _answer_client(self, connection: ClientConnection) -> bool:
        """Answers the requests of one connection for as long as each soon follows the last.

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
                if not more and self._clients.mostly_free and not self.poller.stopping:
                    more = connection.receive_soon(NEXT_REQUEST_SECONDS)
            except BadRequest as error:
                return connection.refuse(error)
            except (ClientClosed, OSError):
                return False
            if not more or _is_probe(connection):
                return True

    def _answer(self, connection: ClientConnection, application: "WSGIApplication", *, keeps: bool) -> bool:
        """Answers a complete request. Returns whether the connection can be used again, which it cannot without `keeps`."""
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
    """How many threads there must be so that one client alone can have `one_client` of them."""
    return one_client + one_client // _MULTIPLE_OF_FREE


def _is_probe(connection: ClientConnection) -> bool:
    environ = connection.reader.environ
    return environ is not None and environ["PATH_INFO"] in PROBES


def _connections_allowed(waiting: int, in_hand: int) -> int:
    """How many connections may wait beside those in hand. Raises the limit of open files as far as that is allowed."""
    wanted = waiting + in_hand + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(_MIN_CONNECTIONS, waiting - (wanted - min(soft, wanted)))


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. The host `::` accepts IPv4 as well. Raises OSError, which names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, f"port {port}: {error.strerror}") from error
