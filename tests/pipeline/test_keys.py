"""API keys and limits of a running gateway over real stages, and logs, which have no key, no prompt and no answer."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from knative.__main__ import main
from tests.support.functions.functions import TOKEN, FunctionProcess, running_gateway, running_stages, wait_until
from tests.support.functions.metrics import metric
from tests.support.storage.published import Published

ALLOWED = 5
GREEDY_AT_ONCE = 48
MODEST_REQUESTS = 6
KEY = "key-of-a-client-that-nobody-else-may-know"
WORD = "unmistakable"  # in every prompt


def ask(
    gateway: FunctionProcess, path: str, body: dict[str, Any] | bytes, key: str = KEY, seconds: float = 120, **headers: str
) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "max_tokens": 12} | body).encode()
    told = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(gateway.url + path, data, told), timeout=seconds) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@dataclass
class RunningPipeline:
    stages: list[FunctionProcess]
    gateway: FunctionProcess
    keys: Path

    def make(self, name: str, *limits: str) -> str:
        options = [option for each in limits for option in ("--limit", each)]
        return self._keys("--make", name, *options).strip()

    def revoke(self, name: str) -> None:
        self._keys("--revoke", name)

    def _keys(self, *arguments: str) -> str:
        done = CliRunner().invoke(main, ["keys", str(self.keys), *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    def status(self, key: str) -> int:
        return ask(self.gateway, "/v1/completions", {"prompt": "Hi", "max_tokens": 2}, key)[0]

    def wait_for(self, key: str, status: int) -> None:
        wait_until(lambda: self.status(key) == status)


@pytest.fixture(scope="module")
def pipeline(
    published: Published, stages: list[FunctionProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningPipeline]:
    keys = tmp_path_factory.mktemp("keys") / "api-keys"
    keys.touch()
    with running_gateway(published, stages, LAMINA_API_KEY_FILES=str(keys)) as gateway:
        yield RunningPipeline(stages, gateway, keys)


def test_a_key_is_valid_seconds_after_it_was_made_and_invalid_seconds_after_it_was_revoked(pipeline: RunningPipeline) -> None:
    alice, bob = pipeline.make("alice"), pipeline.make("bob")
    pipeline.wait_for(alice, 200)
    assert pipeline.status(bob) == 200
    assert pipeline.status(f"{alice}x") == 401
    pipeline.revoke("alice")
    pipeline.wait_for(alice, 401)
    assert pipeline.status(bob) == 200
    pipeline.revoke("bob")
    pipeline.wait_for(bob, 401)
    assert pipeline.gateway.process.poll() is None
    for key in (alice, bob, alice.removeprefix("lamina-")):
        assert key not in pipeline.gateway.log


def test_requests_against_a_limit_reach_no_stage(pipeline: RunningPipeline, wide: bool) -> None:
    requests = 10_000 if wide else 300
    greedy, modest = pipeline.make("greedy", f"requests_per_minute={ALLOWED}"), pipeline.make("modest")
    pipeline.wait_for(modest, 200)
    spent_before = _spent(pipeline)
    body = json.dumps({"model": "tiny", "prompt": "Hello there", "max_tokens": 2})
    headers = {"Authorization": f"Bearer {greedy}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", pipeline.gateway.port, timeout=60)
    statuses = []
    for _ in range(requests):
        connection.request("POST", "/v1/completions", body, headers)
        with connection.getresponse() as reply:
            reply.read()
            statuses.append(reply.status)
        if len(statuses) == ALLOWED:
            wait_until(lambda: metric(pipeline.gateway, "lamina_gateway_running_sequences") == 0)
            spent_after_allowed = _spent(pipeline)
    connection.close()
    assert spent_after_allowed["stage events"] > spent_before["stage events"]
    # More are admitted if a minute ends meanwhile.
    admitted = statuses.count(200)
    assert statuses.count(429) == requests - admitted
    assert ALLOWED <= admitted <= 3 * ALLOWED
    if admitted == ALLOWED:
        assert _spent(pipeline) == spent_after_allowed
    assert pipeline.status(modest) == 200


def _spent(pipeline: RunningPipeline) -> dict[str, float]:
    return {
        "prompt tokens": metric(pipeline.gateway, "lamina_gateway_prompt_tokens_total"),
        "stage events": sum(
            metric(stage, rf'lamina_stage_events_total\{{status="200",type="dev.lamina.{type_}"\}}')
            for stage in pipeline.stages
            for type_ in ("forward", "reserve")
        ),
        "tokens of stages": sum(metric(stage, "lamina_stage_tokens_total") for stage in pipeline.stages),
    }


def test_modest_clients_are_answered_beside_a_greedy_one(published: Published, stages: list[FunctionProcess]) -> None:
    """Each has a key. The greedy one fills the queue."""
    modest, enough, greedy_statuses = [f"modest-{number}" for number in range(5)], threading.Event(), Counter[int]()
    limits = {"LAMINA_QUEUE_LIMIT": "8", "LAMINA_MICRO_BATCH_SEQUENCES": "1", "LAMINA_API_KEYS": ",".join(["greedy", *modest])}

    with running_gateway(published, stages, **limits) as gateway, ThreadPoolExecutor(GREEDY_AT_ONCE + len(modest)) as threads:

        def status(key: str) -> int:
            return ask(gateway, "/v1/completions", {"prompt": key, "max_tokens": 24, "ignore_eos": True}, key)[0]

        def be_greedy() -> None:
            while not enough.is_set():
                greedy_statuses[status("greedy")] += 1
                enough.wait(0.01)

        def be_modest(key: str) -> list[int]:
            return [status(key) for _ in range(MODEST_REQUESTS)]

        try:
            greedy = [threads.submit(be_greedy) for _ in range(GREEDY_AT_ONCE)]
            wait_until(lambda: greedy_statuses[429] > GREEDY_AT_ONCE)
            statuses = list(threads.map(be_modest, modest))
        finally:
            enough.set()
        for each in greedy:
            each.result()
    assert statuses == [[200] * MODEST_REQUESTS] * len(modest)
    assert greedy_statuses[200] > 0, "it goes on beside them"
    assert set(greedy_statuses) == {200, 429}


def test_no_log_has_keys_prompts_or_answers(published: Published) -> None:
    """Whether a request is answered, refused or fails."""
    with running_stages(published, LAMINA_LOG_LEVEL="debug") as stages:
        with running_gateway(published, stages, LAMINA_API_KEYS=KEY, LAMINA_LOG_LEVEL="debug") as gateway:
            message = [{"role": "user", "content": WORD}]
            status, answered = ask(gateway, "/v1/chat/completions", {"messages": message, "ignore_eos": True, "seed": 1})
            assert status == 200
            statuses = [
                ask(gateway, "/v1/completions", {"prompt": WORD, "stream": True})[0],
                ask(gateway, "/v1/chat/completions", {"messages": message}, key=f"{KEY}-not")[0],
                ask(gateway, "/v1/completions", {"prompt": WORD * 1000})[0],
                ask(gateway, "/v1/completions", {"prompt": WORD, "temperature": WORD})[0],
                ask(gateway, "/v1/completions", f'{{"prompt": "{WORD}'.encode())[0],
                ask(gateway, "/", {"prompt": WORD, "unheard-of": WORD}, **{"ce-id": "1", "ce-source": "/x"})[0],
            ]
            assert statuses == [200, 401, 400, 400, 400, 400]
            tool = {"type": "function", "function": {"name": WORD, "parameters": {"type": "object", "title": WORD}}}
            others = {
                "/v1/responses": {"input": WORD},
                "/tokenize": {"prompt": WORD},
                "/v1/chat/completions": {"messages": message, "tools": [tool], "tool_choice": "none"},
                "/v1/completions": {"prompt": [WORD, WORD], "stop": WORD, "structured_outputs": {"choice": [WORD]}},
            }
            for path, body in others.items():
                assert ask(gateway, path, body)[0] in (200, 400), path
            stages[1].process.kill()
            stages[1].wait_end()
            with suppress(OSError):
                ask(gateway, "/v1/completions", {"prompt": WORD}, seconds=3)
            status = gateway.stop()
        text = json.loads(answered)["choices"][0]["message"]["content"]
        assert len(text) > 5, "too short to search for in logs"
    logs = {"gateway": gateway.log, **{f"stage {number}": stage.log for number, stage in enumerate(stages)}}
    assert gateway.log.count('"path":"/v1/completions"') >= 4, "the access log is on"
    for name, log in logs.items():
        for secret in (KEY, TOKEN, WORD, text):
            assert secret not in log, f"the log of {name} has {secret!r}"
    assert status == 0
