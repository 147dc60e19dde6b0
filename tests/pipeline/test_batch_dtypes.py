"""A batch in every dtype, while gateways and stages are killed, has the answers of an undisturbed one.

.venv/bin/python -m pytest --wide -s tests/pipeline/test_batch_dtypes.py      2,000 lines in each dtype, with digests
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import openai
import pytest

from knative.local.kubelet.processes import free_port
from storage.models.model_repository import Dtype
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
from tests.support.storage.published import CUT, Published, published_model

WAIT_SECONDS: Final = 3600.0


@dataclass(frozen=True)
class Disturbance:
    lines: int
    tokens: int  # of each
    kill_seconds: float  # between kills
    most_kills: int


SHORT: Final = Disturbance(lines=64, tokens=96, kill_seconds=2.0, most_kills=4)
WIDE: Final = Disturbance(lines=2000, tokens=32, kill_seconds=10.0, most_kills=1000)


class Processes:
    """Three stages and a gateway, which keep their ports when they are killed and started again."""

    def __init__(self, stack: ExitStack, published: Published) -> None:
        self._stack = stack
        # Ports that no outgoing connection takes while a process is down.
        ports = [str(free_port()) for _ in range(len(CUT) + 1)]
        self._environments = [stage_environment(published, group, PORT=ports[group]) for group in range(len(CUT))]
        self._running = [self._start(each) for each in self._environments]
        urls = [each.url for each in self._running]
        self._environments.append(gateway_environment(published, urls, CUT, LAMINA_JOBS_STORE="lamina/jobs", PORT=ports[-1]))
        self._running.append(self._start(self._environments[-1]))
        for each in self._running:
            each.wait_ready()
        self.kills = 0

    def _start(self, environment: dict[str, str]) -> FunctionProcess:
        return self._stack.enter_context(FunctionProcess(environment))

    @property
    def url(self) -> str:
        return self._running[-1].url

    def kill_next(self) -> None:
        number = self.kills % len(self._running)
        killed = self._running[number]
        killed.process.kill()
        killed.wait_end()
        self._running[number] = self._start(self._environments[number]).wait_ready()
        self.kills += 1


def line(number: int, tokens: int) -> dict[str, Any]:
    """Every third line is drawn, with a seed of its own."""
    drawn = {"temperature": 1.0, "seed": number} if number % 3 == 2 else {"temperature": 0.0}
    body = {"model": "tiny", "prompt": f"line {number}", "max_tokens": tokens, "ignore_eos": True, **drawn}
    return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}


def answered(url: str, lines: int, tokens: int, meanwhile: Callable[[], object]) -> list[str]:
    """The texts of a batch's answers, in their order."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
        content = "\n".join(json.dumps(line(number, tokens)) for number in range(lines)).encode()
        file = client.files.create(file=("input.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        deadline = time.monotonic() + WAIT_SECONDS
        while batch.status != "completed":
            assert time.monotonic() < deadline, batch
            meanwhile()
            time.sleep(0.2)
            batch = client.batches.retrieve(batch.id)
        found = [json.loads(each) for each in client.files.content(str(batch.output_file_id)).text.splitlines()]
    assert [each["custom_id"] for each in found] == [str(number) for number in range(lines)]
    return [each["response"]["body"]["choices"][0]["text"] for each in found]


def digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(2 * WAIT_SECONDS)
@pytest.mark.parametrize(
    "dtype", ["int8", *(pytest.param(name, marks=pytest.mark.wide) for name in ("float32", "bfloat16", "q4", "kept"))]
)
def test_answers_are_those_of_an_undisturbed_batch(tmp_path: Path, dtype: Dtype, wide: bool) -> None:
    of = WIDE if wide else SHORT
    with published_model(tmp_path, dtype) as published, ExitStack() as stack:
        processes = Processes(stack, published)
        undisturbed = answered(processes.url, of.lines, of.tokens, lambda: None)
        killed_at = -of.kill_seconds

        def kill() -> None:
            nonlocal killed_at
            if processes.kills < of.most_kills and time.monotonic() - killed_at > of.kill_seconds:
                processes.kill_next()
                killed_at = time.monotonic()

        disturbed = answered(processes.url, of.lines, of.tokens, kill)
        print(f"{dtype}, {of.lines} lines: sha256 {digest(undisturbed)}; after {processes.kills} kills {digest(disturbed)}")
        assert disturbed == undisturbed
        assert processes.kills >= 2, "the batch was over before it was disturbed"
