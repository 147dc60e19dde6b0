"""The process that pods are forked from: it imports what every function needs, then forks on demand.

It has one thread, runs no function itself, reaps its children and reports their ends. It ends when the platform does,
and its children with it. `python -m knative.local.kubelet.fork_server FD`: a socket to the platform, see fork_messages.
"""

import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Final

import msgspec

from functions.hosting.imports import without_collection
from functions.stage.engine.threads import WAITING
from knative.local.kubelet.fork_isolation import isolate
from knative.local.kubelet.fork_messages import Ended, Fork, Forked, Imported, Refused, line

MODULES: Final = (
    "functions.__main__",
    "functions.hosting.server",
    "functions.observing.telemetry",
    "functions.stage.serving.function",
    "functions.stage.engine.engine",
    "functions.stage.models.build",
    "functions.stage.models.native.group",
    "functions.stage.native.preloaded",
    "functions.gateway.function",
)
"""What native stages and gateways import; not torch and transformers, which only other stages need."""

Main = Callable[[Sequence[str], Mapping[str, str]], int]
"""`functions.__main__.main`."""

_READ_BYTES: Final = 2**16
_FAILED_STATUS: Final = 1


class ThreadsRunning(Exception):
    """A module started a thread when it was imported. A fork would be without it, and hang on what it holds."""


class ForkServer:
    """Serves one platform over `control`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = DefaultSelector()
        self._selector.register(control, EVENT_READ)
        self._received = b""
        self._pid = os.getpid()

    def serve(self) -> bool:
        """Returns False in the server once the platform is gone, and True in every child, isolated and ready to run."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._reap(key.fd, key.data)
                elif not (data := self._control.recv(_READ_BYTES)):
                    return False
                elif any(self._fork(request) for request in self._requests(data)):
                    return True

    def tell_imported(self, seconds: float) -> None:
        self._control.sendall(line(Imported(seconds)))

    def _requests(self, data: bytes) -> list[Fork]:
        *lines, self._received = (self._received + data).split(b"\n")
        return [msgspec.json.decode(each, type=Fork) for each in lines]

    def _fork(self, request: Fork) -> bool:
        """Whether this is the child."""
        opened: list[int] = []
        try:
            opened.append(os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
            opened.extend(os.pipe())
            pid = os.fork()
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            self._control.sendall(line(Refused(request.number, error.errno or 0, error.strerror or str(error))))
            return False
        output, isolated, tell = opened
        if pid == 0:
            self._become(request, output)
            return True
        os.close(output)
        os.close(tell)
        with open(isolated, "rb") as child:
            child.read()  # until it has a session of its own, or is gone: nobody may signal its group before
        self._selector.register(os.pidfd_open(pid), EVENT_READ, pid)
        self._control.sendall(line(Forked(request.number, pid)))
        return False

    def _become(self, request: Fork, output: int) -> None:
        """In the child. That all other files are closed tells the server, which waits at the other end of a pipe."""
        self._selector.close()
        self._control.close()
        try:
            isolate(request.environ, output, self._pid)
        except Exception:  # noqa: BLE001  this is the end of the process
            traceback.print_exc()
            os._exit(_FAILED_STATUS)

    def _reap(self, descriptor: int, pid: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self._control.sendall(line(Ended(pid, os.waitstatus_to_exitcode(status))))


def import_all(modules: Sequence[str]) -> None:
    """Raises ImportError and ThreadsRunning."""
    # Read when the libraries are loaded: numpy's OpenBLAS starts its threads then, and OpenMP's learn how to wait.
    os.environ.update(WAITING, OPENBLAS_NUM_THREADS="1")
    with without_collection():  # nor does a collection in a child touch, and thereby copy, what they have made
        for module in modules:
            importlib.import_module(module)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise ThreadsRunning(f"{threads} threads run after importing {', '.join(modules)}")


def run(descriptor: int, modules: Sequence[str], find_main: Callable[[], Main]) -> int:
    """Serves; in a child, runs its function and does not return. `find_main`: called when the modules are there."""
    began = time.monotonic()
    import_all(modules)
    server = ForkServer(socket.socket(fileno=descriptor))
    server.tell_imported(time.monotonic() - began)
    if not server.serve():
        return 0
    del server
    _run_function(find_main())
    return 0


def _run_function(main: Main) -> None:
    status = _FAILED_STATUS
    try:
        status = main([], os.environ)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else _FAILED_STATUS
    except BaseException:  # noqa: BLE001  this is the end of the process
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as functions.__main__ ends: nothing is left to do, and daemon threads may hang


def _functions_main() -> Main:
    from functions.__main__ import main

    return main


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), MODULES, _functions_main))
