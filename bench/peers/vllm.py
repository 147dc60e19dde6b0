"""vLLM as a peer of `bench.peers`: a process of its own that answers JSON lines (`vllm_process.py`)."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Any, Final

from bench.pipeline import DidNotStart
from bench.report import ROOT
from bench.serving.client import Measurement
from bench.serving.contenders import Contender, ContenderEnded
from bench.serving.requests import Request
from knative.local.kubelet.processes import kill_group

_STOP_SECONDS: Final = 10.0


@contextmanager
def running_vllm(name: str, folder: Path, log: Path) -> Iterator[Contender]:
    """vLLM's CPU build with a model folder, its OpenMP and tcmalloc preloaded.

    Raises DidNotStart if it is not installed, ContenderEnded if the process ends, also in `measure`.
    """
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
    # -P: without the script's folder on the path, in which this file would be imported as vllm
    command = [str(python), "-P", "bench/peers/vllm_process.py", str(folder)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **told},
            start_new_session=True,
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
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            kill_group(process.pid)  # its engine and worker would go on
