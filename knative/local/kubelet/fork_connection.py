"""The platform's end of a fork server: its process, and the processes that are forked from it."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

from knative.local.kubelet.container_life import last_line
from knative.local.kubelet.fork_messages import Answer, Ended, Fork, Forked, Imported, line
from knative.local.kubelet.processes import dying_with_parent, kill_group


class ForkServerGone(Exception):
    """The server ended, or never came up. The message says how, and where its log is."""


class ForkedProcess:
    """A child of the server, which reaps it. Implements Process."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        self._pid = pid
        self._ended = ended

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> int:
        """As Process says; SIGKILL where the server is gone, for then the kernel kills its children."""
        return await asyncio.shield(self._ended)


class ForkConnection:
    """`launch` it, `fork` any number of times, `close` it."""

    def __init__(
        self, process: asyncio.subprocess.Process, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], log: Path
    ) -> None:
        self.gone = False
        self._process = process
        self._reader, self._writer = streams
        self._log = log
        self._numbers = itertools.count()
        self._imported = asyncio.get_running_loop().create_future()
        self._asked: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._reading = asyncio.create_task(self._read(), name="fork server")

    @classmethod
    async def launch(cls, module: str, folder: Path, log: Path) -> Self:
        """Returns once the server has its imports done. Raises ForkServerGone."""
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *dying_with_parent((sys.executable, "-m", module, str(theirs.fileno())), os.environ),
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        connection = cls(process, await asyncio.open_connection(sock=ours), log)
        try:
            await connection._imported
        except BaseException:
            await connection.close()
            raise
        return connection

    async def fork(self, environ: Mapping[str, str], log: Path) -> ForkedProcess:
        """A process with this environment, its output appended to `log`. Raises OSError, and ForkServerGone."""
        if self.gone:
            raise await self._cause()
        number = next(self._numbers)
        asked: asyncio.Future[ForkedProcess] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._writer.write(line(Fork(number, dict(environ), str(log.resolve()))))
        return await asked

    async def close(self) -> None:
        """Ends the server, which has nothing to lose, and with it what it has forked."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while message := await self._reader.readline():
                self._take(msgspec.json.decode(message, type=Answer))
        except ConnectionError:
            pass  # it died with something unread
        finally:
            self.gone = True
            self._writer.close()
            await self._give_up()

    def _take(self, answer: Answer) -> None:
        match answer:
            case Imported():
                _settle(self._imported, answer.seconds)
            case Forked():
                self._forked(answer)
            case Ended():
                _settle(self._ends.pop(answer.pid), answer.status)
            case _:
                self._asked.pop(answer.number).set_exception(OSError(answer.errno, answer.reason))

    def _forked(self, answer: Forked) -> None:
        ended = self._ends[answer.pid] = asyncio.get_running_loop().create_future()
        asked = self._asked.pop(answer.number)
        if asked.cancelled():
            kill_group(answer.pid)  # nobody wants it any more
        else:
            asked.set_result(ForkedProcess(answer.pid, ended))

    async def _give_up(self) -> None:
        for ended in self._ends.values():
            _settle(ended, -signal.SIGKILL)
        cause = await self._cause()
        for waiting in (self._imported, *self._asked.values()):
            if not waiting.done():
                waiting.set_exception(cause)
                waiting.exception()  # read: where nobody waits, nobody is to be warned

    async def _cause(self) -> ForkServerGone:
        status = await self._process.wait()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return ForkServerGone(f"the fork server ended ({how}: {last_line(self._log)}); its log: {self._log}")


def _settle(future: asyncio.Future[float] | asyncio.Future[int], value: float) -> None:
    if not future.done():
        future.set_result(value)  # type: ignore[arg-type]
