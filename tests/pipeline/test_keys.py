"""API keys and limits of a running gateway over real stages."""

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from knative.__main__ import main
from tests.pipeline.test_nothing_said import ask
from tests.support.functions.functions import FunctionProcess, gateway_environment, running_stages, wait_until
from tests.support.storage.published import Published

ALLOWED = 5


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
        wait_until(lambda: self.status(key) == status, 5.0)


@pytest.fixture(scope="module")
def pipeline(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPipeline]:
    keys = tmp_path_factory.mktemp("keys") / "api-keys"
    keys.touch()
    with running_stages(published) as stages:
        environ = gateway_environment(published, [stage.url for stage in stages], LAMINA_API_KEY_FILES=str(keys))
        with FunctionProcess(environ) as gateway:
            gateway.wait_ready()
            yield RunningPipeline(list(stages), gateway, keys)


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
    requests = 10_000 if wide else 1000
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
            wait_until(lambda: _sample(pipeline.gateway, "lamina_gateway_running_sequences") == 0)
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
        "prompt tokens": _sample(pipeline.gateway, "lamina_gateway_prompt_tokens_total"),
        "stage events": sum(
            _sample(stage, f'lamina_stage_events_total{{status="200",type="dev.lamina.{type_}"}}')
            for stage in pipeline.stages
            for type_ in ("forward", "reserve")
        ),
        "tokens of stages": sum(_sample(stage, "lamina_stage_tokens_total") for stage in pipeline.stages),
    }


def _sample(function: FunctionProcess, name: str) -> float:
    text = str(function.get("/metrics")[1])
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)
