"""Serves a WSGI application from this one process with gunicorn's threaded worker.

The worker runs without gunicorn's arbiter: a function is one process, so that a signal sent to it means it, its death is seen
by whoever started it, and nothing restarts it behind the platform's back.
"""

import logging
import os
import select
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import TConn, ThreadWorker

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS: Final = 75
"""Longer than the senders keep an idle connection (eventing/delivery), so that they close it and not the server."""

GRACEFUL_SECONDS: Final = 600
"""Longest time after SIGTERM: Knative's upper limit of timeoutSeconds, behind which the platform kills."""

NEXT_REQUEST_SECONDS: Final = 0.25
"""How long a thread that has answered waits for the connection's next request before the poller does. As short as what a new
connection may lose if all other threads became busy meanwhile."""

_BACKLOG: Final = 2048
_CONNECTIONS: Final = 4096


class Server:
    """Listens from construction, so that requests wait rather than fail while the application starts."""

    def __init__(self, port: int, threads: int) -> None:
        """Binds 0.0.0.0:port. Raises OSError where that is not possible."""
        self._listener = _listen(port)
        self._threads = threads
        self._lock = threading.Lock()
        self._running = False
        self._status: int | None = None

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def run(self, application: "WSGIApplication", on_stop: Callable[[], None]) -> int:
        """Serves until SIGTERM, SIGINT or `stop`; then calls `on_stop` and finishes what is in hand. Main thread only.

        Returns the status to exit with: 0, or what `stop` was told.
        """
        adapter = _Adapter(application, self._threads)
        worker = _Worker(self, adapter, self._listener, on_stop)
        try:
            worker.init_process()
        finally:
            worker.tmp.close()
        return self._status or 0

    def stop(self, status: int) -> None:
        """Ends `run` as SIGTERM would, with this exit status. From any thread; may come before `run`."""
        with self._lock:
            self._status = status
            if self._running:
                os.kill(os.getpid(), signal.SIGTERM)

    def signals_are_set(self) -> bool:
        """From here on `stop` may send a signal. False where `stop` came before."""
        with self._lock:
            self._running = True
            return self._status is None


class _Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    def __init__(self, server: Server, adapter: "_Adapter", listener: socket.socket, on_stop: Callable[[], None]) -> None:
        log = adapter.cfg.logger_class(adapter.cfg)
        super().__init__(1, os.getppid(), [listener], adapter, adapter.cfg.timeout, adapter.cfg, log)
        self._server = server
        self._on_stop = on_stop
        self._submitted = 0
        """Connections that the pool has in hand or queued."""

    def enqueue_req(self, conn: TConn) -> None:
        self._submitted += 1
        super().enqueue_req(conn)

    def finish_request(self, conn: TConn, fs: "Future[Any]") -> None:
        self._submitted -= 1
        super().finish_request(conn, fs)

    def handle(self, conn: TConn) -> Any:
        """Requests of one connection for as long as each soon follows the last: handing the socket to the poller and back
        wakes two threads for each of them. Only while half of the pool is free, and not once the server stops."""
        keeps = super().handle(conn)
        while keeps is True and self.alive and self._submitted * 2 <= self.cfg.threads and _sends_more(conn):
            keeps = super().handle(conn)
        return keeps

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, self.handle_exit)
        self.alive = self._server.signals_are_set()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.alive:
            # In a thread: a signal handler interrupts anything, also who holds the locks that this may need.
            threading.Thread(target=self._on_stop, name="on-stop", daemon=True).start()
        super().handle_exit(sig, frame)

    def is_parent_alive(self) -> bool:
        """There is no arbiter to lose: who started the function may end before it."""
        return True

    def notify(self) -> None:
        """There is no arbiter to tell."""


class _Adapter(BaseApplication):  # type: ignore[misc]
    """What gunicorn's worker wants to know."""

    def __init__(self, application: "WSGIApplication", threads: int) -> None:
        self._application = application
        self._threads = threads
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "threads": self._threads,
            "worker_connections": self._threads + _CONNECTIONS,
            "keepalive": KEEP_ALIVE_SECONDS,
            "graceful_timeout": GRACEFUL_SECONDS,
            "timeout": 0,
            "worker_tmp_dir": _scratch_folder(),
            "logger_class": _Logger,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> "WSGIApplication":
        return self._application


class _Logger(Logger):  # type: ignore[misc]
    """gunicorn's messages go where all others go; there is no access log."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


def _sends_more(conn: TConn) -> bool:
    """Whether the next request begins, or the connection ends, soon. False where it has begun to arrive with the last one."""
    if conn.parser.unreader.buf.getvalue():  # The socket tells nothing of these bytes; gunicorn looks for them.
        return False
    poll = select.poll()
    poll.register(conn.sock, select.POLLIN)
    return bool(poll.poll(NEXT_REQUEST_SECONDS * 1000))


def _listen(port: int) -> socket.socket:
    listener = socket.create_server(("0.0.0.0", port), backlog=_BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _scratch_folder() -> str:
    """gunicorn wants a temporary file; the root file system may be read-only, /dev/shm is memory."""
    shm = Path("/dev/shm")
    return str(shm) if os.access(shm, os.W_OK) else tempfile.gettempdir()
