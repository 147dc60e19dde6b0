"""Peers of `bench.peers` that are no servers: vLLM and transformers, each a process of its own that answers JSON lines."""

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
from bench.serving.contenders import Contender, ContenderEnded
from bench.serving.requests import Request
from functions.stage.engine.threads import WAITING


def running_transformers(name: str, source: str, log: Path) -> AbstractContextManager[Contender]:
    """transformers with the whole model. Its threads spin briefly like a stage's, so that other load costs it no more."""
    return _running(name, [sys.executable, "-m", "bench.peers.transformers_process", source], WAITING, log)


def running_vllm(name: str, folder: Path, log: Path) -> AbstractContextManager[Contender]:
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
    return _running(name, [str(python), "bench/peers/vllm_process.py", str(folder)], told, log)


@contextmanager
def _running(name: str, command: list[str], environ: Mapping[str, str], log: Path) -> Iterator[Contender]:
    """Raises ContenderEnded if the process ends, also in `measure`."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environ},
        ) as process,
    ):

        def read() -> dict[str, Any]:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise ContenderEnded("its process has ended", log)
            answer: dict[str, Any] = json.loads(line)
            return answer

        async def measure(requests: Sequence[Request]) -> Measurement:
            asked = [{"token_ids": request.token_ids, "max_tokens": request.max_tokens} for request in requests]
            print(json.dumps({"requests": asked}), file=process.stdin, flush=True)
            return Measurement(**await asyncio.to_thread(read))

        try:
            read()  # the model is loaded
            yield Contender(name, (process.pid,), measure)
        finally:
            process.terminate()
