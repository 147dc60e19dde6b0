"""The processes of pods. Each has a session of its own and ends with the platform, even if the platform is killed."""

import asyncio
import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

# Below the range that Linux takes ports of outgoing connections from (ip_local_port_range). One of those would now and then
# be taken between the choice of a port and the function's own bind.
_POD_PORTS: Final = range(20_000, 32_000)
_TRIES: Final = 50
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[3:])
"""


Process = asyncio.subprocess.Process  # its pid is also its process group


async def start_process(command: Sequence[str], environ: Mapping[str, str], folder: Path, log: Path) -> Process:
    """Starts the command in `folder`, in a session of its own; its output is appended to `log`. Raises OSError."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *dying_with_parent(command, environ),
            env=dict(environ),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )


def dying_with_parent(command: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the command with a launcher in front, so that the kernel kills it when this process dies (on Linux).

    The launcher runs between fork and exec, where Python code in a process with threads must not. environ: its PATH finds the
    command. Raises FileNotFoundError.
    """
    executable = shutil.which(command[0], path=environ.get("PATH"))
    if executable is None:
        raise FileNotFoundError(errno.ENOENT, "no such command", command[0])
    return (sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), executable, *command)


def kill_group(pid: int) -> None:
    """Sends SIGKILL to the process and to all others of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that is free now; another process may still take it."""
    for port in (*random.sample(_POD_PORTS, _TRIES), 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the function does: a port in TIME_WAIT is free
            probe.bind(("0.0.0.0", port))
            found: int = probe.getsockname()[1]
            return found
    raise OSError(errno.EADDRINUSE, "no free port")


def memory_bytes(pid: int) -> int:
    """Bytes of private and shared memory of the process, without mapped files; 0 if unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in sizes)
