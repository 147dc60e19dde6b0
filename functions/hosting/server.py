"""Serves a function over HTTP from this one process: the poller's thread reads requests, pool threads answer them.

There is no parent process: signals reach the server itself, and the platform sees when it dies. A thread gets a request only
once it is complete. So clients that send slowly occupy a connection but no thread (docs/log.md says what other servers did).
"""

import resource
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

from functions.hosting.answering import MAX_QUEUED, Answering, Service, threads_for
from functions.hosting.connection import ServerLimits
from functions.hosting.poller import Poller

_BACKLOG: Final = 2048
_MIN_CONNECTIONS: Final = 16
_OTHER_FILES: Final = 512  # file descriptors for connections to stages and the store, and for libraries


class Server:
    """A function's HTTP server.

    It listens from its construction on, so that requests wait rather than fail while the application starts.
    """

    def __init__(self, host: str, port: int, management_port: int, limits: ServerLimits | None = None) -> None:
        """Listens on both ports; for port 0 the operating system chooses one. Raises OSError, which names the port."""
        self._limits = limits or ServerLimits()
        self._listener = listen(host, port)
        self._management_listener = listen(host, management_port)
        self.port, self.management_port = _port(self._listener), _port(self._management_listener)
        self._host = host
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._status: int | None = None

    def run(self, service: Service, on_stop: Callable[[], None], close: Callable[[], None]) -> int:
        """Serves until SIGTERM, SIGINT or `stop`, then finishes the requests that have begun.

        Call it from the main thread only. Returns the exit status: 0, or the status given to `stop`. At the end of serving,
        `on_stop` is called in a thread of its own. `close` is called when all requests are finished, or after
        ServerLimits.graceful_seconds. It must make the remaining requests fail; their replies are still sent.
        """
        answering = Answering(service, self._limits)
        waiting = _connections_allowed(self._limits.waiting_connections, threads_for(service.threads) + MAX_QUEUED)
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
        """Ends `run` as SIGTERM would; `run` then returns `status`. Any thread may call it, also before `run`."""
        with self._lock:
            self._status = status
            stop = self._stop
        if stop is not None:
            stop()


def _connections_allowed(waiting: int, in_hand: int) -> int:
    """Returns how many connections may wait, besides `in_hand` connections whose requests are queued or being answered.

    Raises the process's limit of open files as far as necessary and allowed.
    """
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
    """Returns a listening socket. The host `::` accepts IPv4 as well. Raises OSError, which names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, f"port {port}: {error.strerror}") from error
