"""Starts pods by forking them from a process that has the imports done; where that is not possible, plainly."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from knative.local.kubelet.containers import FUNCTION
from knative.local.kubelet.fork_connection import ForkConnection, ForkServerGone
from knative.local.kubelet.processes import PlainStarter, Process

_log = logging.getLogger(__name__)

_SERVER_MODULE: Final = "knative.local.kubelet.fork_server"


class ForkStarter:
    """Implements ProcessStarter: forks functions that run in `folder`, and starts every other command plainly. Linux.

    A context manager: on entry the server is launched, without waiting for its imports; on exit it ends. One that dies takes
    its pods along, and the next start launches another. Where one cannot be launched, the log says why, once, and pods are
    started plainly.
    """

    def __init__(self, folder: Path, log: Path, *, module: str = _SERVER_MODULE) -> None:
        """log: of the server. module: what is run as the server."""
        self._folder = folder
        self._log = log
        self._module = module
        self._plain = PlainStarter()
        self._server: asyncio.Task[ForkConnection] | None = None

    async def __aenter__(self) -> Self:
        self._server = asyncio.create_task(self._launch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is None:
            return
        self._server.cancel()
        with contextlib.suppress(ForkServerGone, asyncio.CancelledError):
            await (await self._server).close()

    async def warm(self) -> None:
        """Waits until the server has its imports done. Raises ForkServerGone where it could not be launched."""
        await self._connection()

    async def start(self, command: Sequence[str], environ: Mapping[str, str], folder: Path, log: Path) -> Process:
        """As ProcessStarter says. Waits for the server's imports where they are not done yet."""
        if tuple(command) == FUNCTION and folder == self._folder:
            try:
                return await (await self._connection()).fork(environ, log)
            except ForkServerGone as error:
                _log.info("starting plainly: %s", error)
        return await self._plain.start(command, environ, folder, log)

    async def _connection(self) -> ForkConnection:
        """Raises ForkServerGone where the server could not be launched."""
        server = self._server
        if server is None or (server.done() and server.exception() is None and server.result().gone):
            server = self._server = asyncio.create_task(self._launch())
        return await asyncio.shield(server)

    async def _launch(self) -> ForkConnection:
        try:
            return await ForkConnection.launch(self._module, self._folder, self._log)
        except ForkServerGone as error:
            _log.warning("pods are started plainly, each with imports of its own: %s", error)
            raise
