"""Serves a function over HTTP from this one process: one thread reads requests, others answer them.

A signal sent to the process means it, its death is seen by whoever started it, and nothing restarts it behind the platform's
back. A request is given to a thread once it is whole, so that clients which send slowly, or not at all, hold a connection and
no thread; docs/log.md says what other servers did. Probes have a thread of their own on the clients' port, and the
management port has one.
"""

import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from functions.hosting.connection import Connection, client_gone
from functions.hosting.environ import CLIENT_GONE, MANAGEMENT, base_environ
from functions.hosting.limits import BodyBudget, Limits
from functions.hosting.poller import Door, Poller
from functions.hosting.reply import Reply
from functions.hosting.request_reader import BadRequest, ClientClosed, RequestReader
from functions.threads.pool import ThreadPool

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from functions.hosting.request_reader import Admit

_log = logging.getLogger(__name__)

PROBES: Final = ("/healthz", "/readyz")
NEXT_REQUEST_SECONDS: Final = 0.25
"""How long a thread that has answered waits for the connection's next request before the poller does: handing the socket to it
and back wakes two threads for each request. Only while half of the threads have nothing to do."""

_BACKLOG: Final = 2048
_MANAGEMENT_CONNECTIONS: Final = 32
_WAITING_REQUESTS: Final = 256
"""Whole ones that no thread has taken; more are refused."""
_FEWEST_WAITING: Final = 16
_FILES_FOR_OTHERS: Final = 512
"""That the process opens besides: connections to stages and to the store, the libraries' own."""


@dataclass(frozen=True, slots=True)
class Service:
    """What a function answers with."""

    application: "WSGIApplication"
    management: "WSGIApplication"
    """Answers probes on the clients' port, and everything on its own. Waits for nothing."""
    admit: "Admit"
    threads: int
    """Requests in hand at the same time."""
    request_bytes: int
    """Of all bodies in memory together."""


class Server:
    """Listens from construction, so that requests wait rather than fail while the application starts."""

    def __init__(self, host: str, port: int, management_port: int, limits: Limits | None = None) -> None:
        """Port 0: a free one. Raises OSError, which names the port, where that is not possible."""
        self._limits = limits or Limits()
        self._listener = _listen(host, port)
        self._management_listener = _listen(host, management_port)
        self._host = host
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._status: int | None = None

    @property
    def port(self) -> int:
        return _port(self._listener)

    @property
    def management_port(self) -> int:
        return _port(self._management_listener)

    def run(self, service: Service, on_stop: Callable[[], None]) -> int:
        """Serves until SIGTERM, SIGINT or `stop`; then calls `on_stop` and finishes what is in hand. Main thread only.

        Returns the status to exit with: 0, or what `stop` was told.
        """
        serving = _Serving(service, self._limits)
        waiting = _room_for(self._limits.waiting_connections, service.threads + _WAITING_REQUESTS)
        poller = Poller(
            [
                serving.door(self._host, self._listener, waiting, management=False),
                serving.door(self._host, self._management_listener, _MANAGEMENT_CONNECTIONS, management=True),
            ],
            self._limits,
        )
        serving.poller = poller

        def stop(*_: object) -> None:
            if not poller.stopping:
                poller.stop()
                # In a thread: a signal's handler interrupts anything, also who holds the locks that this may need.
                threading.Thread(target=on_stop, name="on-stop", daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        with self._lock:
            self._stop = stop
            stopped_before = self._status is not None
        if stopped_before:
            stop()
        poller.run()
        return self._status or 0

    def stop(self, status: int) -> None:
        """Ends `run` as SIGTERM would, with this exit status. From any thread; may come before `run`."""
        with self._lock:
            self._status = status
            stop = self._stop
        if stop is not None:
            stop()


class _Serving:
    """Who answers which request."""

    poller: Poller

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._budget = BodyBudget(service.request_bytes)
        self._clients = ThreadPool(service.threads, "request")
        self._probes = ThreadPool(1, "probe")
        self._managers = ThreadPool(1, "management")

    def door(self, host: str, listener: socket.socket, most_waiting: int, *, management: bool) -> Door:
        port = _port(listener)

        def read(client: tuple[str, int]) -> RequestReader:
            base = base_environ(host, port, client) | {MANAGEMENT: management}
            return RequestReader(_no_body if management else self._admit, self._budget, base)

        if management:
            return Door(listener, most_waiting, read, lambda _: self._managers.waiting < most_waiting, self._manage)
        return Door(listener, most_waiting, read, self._takes, self._dispatch)

    def _admit(self, environ: dict[str, Any]) -> int:
        return 0 if environ["PATH_INFO"] in PROBES else self._service.admit(environ)

    def _takes(self, connection: Connection) -> bool:
        pool = self._probes if _is_probe(connection) else self._clients
        return pool.waiting < _WAITING_REQUESTS

    def _dispatch(self, connection: Connection) -> None:
        if _is_probe(connection):
            self._probes.submit(self._serve_for_platform, connection)
        else:
            self._clients.submit(self._serve_client, connection)

    def _manage(self, connection: Connection) -> None:
        self._managers.submit(self._serve_for_platform, connection)

    def _serve_client(self, connection: Connection) -> None:
        self._serve(connection, self._answer_client)

    def _serve_for_platform(self, connection: Connection) -> None:
        self._serve(connection, self._answer_probe)

    def _serve(self, connection: Connection, answer: Callable[[Connection], bool]) -> None:
        """answer: what is to be done on the connection, and whether something may follow."""
        try:
            keeps = answer(connection)
        except Exception:  # noqa: BLE001 - logged; one connection must not take its thread with it, nor stay in hand for ever
            _log.exception("a connection broke")
            keeps = False
        self.poller.take_back(connection, keeps=keeps)

    def _answer_probe(self, connection: Connection) -> bool:
        """One on each connection: the first reply always fits into what the kernel holds, so that no reader is waited for."""
        self._answer(connection, self._service.management, keeps=False)
        return False

    def _answer_client(self, connection: Connection) -> bool:
        """The requests of one connection for as long as each soon follows the last."""
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

    def _answer(self, connection: Connection, application: "WSGIApplication", *, keeps: bool) -> bool:
        environ = connection.reader.environ
        assert environ is not None
        environ[CLIENT_GONE] = client_gone(connection.sock)
        reply = Reply(connection.sock, environ, self._limits, keeps=keeps)
        try:
            reply.answer(application, environ)
        except OSError:  # The client is gone, or reads nothing.
            return False
        return reply.keeps


def _is_probe(connection: Connection) -> bool:
    environ = connection.reader.environ
    return environ is not None and environ["PATH_INFO"] in PROBES


def _no_body(_: object) -> int:
    return 0


def _room_for(waiting: int, in_hand: int) -> int:
    """Connections that may wait beside those in hand; raises the limit of open files as far as it may be raised."""
    wanted = waiting + in_hand + _FILES_FOR_OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(_FEWEST_WAITING, waiting - (wanted - min(soft, wanted)))


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def _listen(host: str, port: int) -> socket.socket:
    """`::` takes IPv4 as well."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, f"port {port}: {error.strerror}") from error
