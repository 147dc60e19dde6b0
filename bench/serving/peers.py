"""transformers as a peer of `bench.serving`: the client of its process."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.report import ROOT
from bench.serving.client import Measurement
from bench.serving.requests import Request
from functions.stage.engine.threads import WAITING


class Transformers:
    """The process of `bench.serving.peers_transformers`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pids = (process.pid,)
        self._read()

    def bytes_per_second(self) -> float:
        """Memory bandwidth of all cores together."""
        return float(self._ask("bandwidth", ())["bytes_per_second"])

    async def measure(self, how: str, requests: Sequence[Request]) -> Measurement:
        """how: generate or generate_batch. Raises RuntimeError if the process has ended."""
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
    """Loads the model before it yields. Its threads spin briefly like a stage's, so that other load costs it no more."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.serving.peers_transformers", model],
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
