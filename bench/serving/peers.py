"""Peers that are no servers: transformers and vLLM, each in a process that answers JSON lines."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from bench.pipeline import DidNotStart
from bench.report import ROOT
from bench.serving.client import Measurement
from bench.serving.requests import Request
from functions.stage.engine.threads import WAITING


class PeerProcess:
    """A process that answers one command a line. It has loaded its model when this object is made."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pids = (process.pid,)
        self._read()

    def bytes_per_second(self) -> float:
        """Memory bandwidth of all cores together; transformers' process alone measures it."""
        return float(self._ask("bandwidth", ())["bytes_per_second"])

    async def measure(self, how: str, requests: Sequence[Request]) -> Measurement:
        """how: generate or generate_batch, for transformers' process. Raises RuntimeError if the process has ended."""
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
            raise RuntimeError("the peer's process has ended; its log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def running_transformers(model: str, log: Path) -> AbstractContextManager[PeerProcess]:
    """transformers with the whole model. Its threads spin briefly like a stage's, so that other load costs it no more."""
    command = [sys.executable, "-m", "bench.serving.peers_transformers", model]
    return _running(command, {**os.environ, **WAITING}, log)


def running_vllm(folder: Path, log: Path) -> AbstractContextManager[PeerProcess]:
    """vLLM's CPU build with a model folder, its OpenMP and tcmalloc preloaded. Raises DidNotStart if it is not installed."""
    python = ROOT / ".vllm" / "bin" / "python"
    if not python.exists():
        raise DidNotStart("vLLM is not installed: make vllm", python)
    preloaded = [str(python.parents[1] / "lib" / "libiomp5.so"), find_library("tcmalloc_minimal") or ""]
    cores = sorted(os.sched_getaffinity(0))
    told = {
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    }
    return _running([str(python), "bench/peers/vllm_process.py", str(folder)], {**os.environ, **told}, log)


@contextmanager
def _running(command: list[str], environ: Mapping[str, str], log: Path) -> Iterator[PeerProcess]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environ,
        )
        with process:
            try:
                yield PeerProcess(process)
            finally:
                process.terminate()
