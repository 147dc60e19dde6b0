"""llama.cpp as its own experts would run it: built on this machine for this CPU (`make llama-cpp`)."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from bench.pipeline import DidNotStart, started, succeeds, wait_for
from bench.report import ROOT
from knative.local.kubelet.processes import free_port

SOURCES: Final = ROOT / ".llama.cpp"
SLOTS: Final = 16
_CONTEXT_TOKENS: Final = 32_768


def tool(name: str) -> Path:
    """A program of the build. Raises DidNotStart if it was not built."""
    path = SOURCES / "build" / "bin" / name
    if not path.exists():
        raise DidNotStart("llama.cpp is not built: make llama-cpp", path)
    return path


@contextmanager
def llama_server(file: Path, log: Path, threads: int, options: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Serves a GGUF file. options: further ones of llama-server. Yields its URL and its process id. Raises DidNotStart."""
    port = free_port()
    command = [str(tool("llama-server")), "--model", str(file), "--host", "127.0.0.1", "--port", str(port), *options]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    command += ["--ctx-size", str(_CONTEXT_TOKENS), "--parallel", str(SLOTS)]
    with started(command, log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: succeeds(f"{url}/health"), process, log)
        yield url, process.pid


@contextmanager
def llama_server_over_rpc(file: Path, log: Path, threads: int, servers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Serves a GGUF file cut over `servers` processes. Yields its URL and all process ids. Raises DidNotStart."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(servers)]
        pids = []
        for port in ports:
            command = [str(tool("ggml-rpc-server")), "--threads", str(threads), "--port", str(port)]
            own_log = log.with_suffix(f".{port}.log")
            process = stack.enter_context(started(command, own_log))
            wait_for(partial(_listens, port), process, own_log)  # llama-server aborts if it cannot connect at once
            pids.append(process.pid)
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        options = ["--rpc", addresses, "--n-gpu-layers", "999"]
        url, pid = stack.enter_context(llama_server(file, log, threads, options))
        yield url, (pid, *pids)


def _listens(port: int) -> bool | None:
    """True, or None: nothing listens at the port yet."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30):
        return True
    return None
