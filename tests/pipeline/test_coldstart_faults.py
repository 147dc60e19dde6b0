"""A cold pipeline whose store misbehaves: a request survives what the start survives, and the answer is right."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from functions.hosting.startup import PHASES
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment, wait_until
from tests.support.functions.served import answer_to
from tests.support.knative.cold_pipeline import cold_pipeline, pods_of
from tests.support.storage.published import Published
from tests.support.storage.storage import Fault, FaultProxy

STAGE = 1  # whose store misbehaves: it has layers 2 and 3
WEIGHTS = "layer-0000"
DEADLINE_SECONDS = 90.0
PROMPT = "The capital of France is"


def disappear(proxy: FaultProxy, seconds: float) -> None:
    """With the first read of weights, for so long."""
    lock = threading.Lock()

    def back() -> None:
        proxy.faults.clear()
        proxy.up()

    def leave(method: str, path: str) -> None:
        if WEIGHTS in path and lock.acquire(blocking=False):
            threading.Thread(target=proxy.down).start()
            threading.Timer(seconds, back).start()

    proxy.on_request = leave


SURVIVED: dict[str, Callable[[FaultProxy], None]] = {
    "drops connections": lambda proxy: proxy.faults.extend([Fault(WEIGHTS, times=4, reset_after=1000)]),
    "ends answers early": lambda proxy: proxy.faults.extend([Fault(WEIGHTS, times=4, end_after=1000)]),
    "returns 500s": lambda proxy: proxy.faults.extend([Fault(times=6, status=500)]),
    "serves an altered byte": lambda proxy: proxy.faults.extend([Fault(WEIGHTS, times=2, flip_byte=2000)]),
    "stalls": lambda proxy: proxy.faults.extend([Fault(WEIGHTS, times=1, stall_after=1000)]),
    "is gone for 10 seconds": lambda proxy: disappear(proxy, 10.0),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.wide if fault in ("ends answers early", "returns 500s", "stalls") else ())
        for fault in SURVIVED
    ],
)
def test_a_request_survives_a_store_that(fault: str, published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    SURVIVED[fault](proxy)
    wanted = published.expected(PROMPT, 12)

    async def run() -> None:
        endpoints = {STAGE: proxy.settings.endpoint_url}
        async with cold_pipeline(published, tmp_path, endpoints) as (platform, local):
            answer = await answer_to(platform.url(local.pipeline.spec.name), PROMPT, 12)
            assert list(answer.token_ids) == wanted
            assert answer.text == published.tokenizer.decode(wanted)
            (pod,) = pods_of(platform, local.pipeline.stage_name(STAGE))
            assert pod["restarts"] == 0

    asyncio.run(asyncio.wait_for(run(), DEADLINE_SECONDS))
    assert proxy.count("GET") > 0
    assert not any(fault.times for fault in proxy.faults), "the store was better than the test says"


FATAL: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "alters a byte each time": ({"flip_byte": 2000}, ("layer-0000", "part 0", "BLAKE3", "publish the model again")),
    "refuses": ({"status": 403}, ("bucket", "key")),
    "has lost them": ({"status": 404}, ("no object", "layer-0000")),
}


@pytest.mark.parametrize("fault", FATAL)
def test_a_stage_ends_and_names_the_cause_where_its_store(fault: str, published: Published, proxy: FaultProxy) -> None:
    broken, words = FATAL[fault]
    proxy.faults.append(Fault(WEIGHTS, times=10_000, **broken))
    environ = stage_environment(published, STAGE) | {"LAMINA_STORE_ENDPOINT": proxy.settings.endpoint_url}
    with FunctionProcess(environ) as stage:
        assert stage.get("/readyz")[0] == 503
        assert stage.wait_end() == 1
    (error,) = (line for line in stage.log.splitlines() if "ERROR" in line)
    assert "the stage cannot start" in error
    assert all(word in error for word in words), error
    assert "ready:" not in stage.log


def test_a_start_that_hangs_says_where(published: Published, proxy: FaultProxy) -> None:
    """Its metrics have the phases that ended, and how far the weights are, while the store stalls."""
    proxy.faults.extend([Fault("layer-00003", times=10_000, stall_after=0)])
    environ = stage_environment(published, STAGE) | {"LAMINA_STORE_ENDPOINT": proxy.settings.endpoint_url}
    objects = published.manifest.objects
    loaded, total = objects["layer-00002"].bytes, objects["layer-00002"].bytes + objects["layer-00003"].bytes
    with FunctionProcess(environ) as stage:
        wait_until(lambda: f"lamina_stage_loaded_bytes {loaded:.1f}" in stage.get("/metrics")[1])
        metrics = stage.get("/metrics")[1]
        assert f"lamina_stage_weights_bytes {total:.1f}" in metrics
        assert 'lamina_startup_phase_seconds{phase="first_byte"}' in metrics
        assert 'lamina_startup_phase_seconds{phase="last_byte"}' not in metrics
        assert "lamina_ready 0.0" in metrics
        assert stage.get("/readyz")[1]["start_up"].keys() >= {"process", "connect", "first_byte"}
        proxy.faults.clear()
        proxy.down()  # ends what is stalled
        proxy.up()
        stage.wait_ready()
        metrics = stage.get("/metrics")[1]
        assert all(f'lamina_startup_phase_seconds{{phase="{phase}"}}' in metrics for phase in PHASES)


def test_the_gateway_too_starts_through_faults(published: Published, proxy: FaultProxy) -> None:
    proxy.faults.extend([Fault(times=3, status=503), Fault("tokenizer.json", times=2, reset_after=100)])
    environ = gateway_environment(published, ["http://127.0.0.1:9"] * 3) | {
        "LAMINA_STORE_ENDPOINT": proxy.settings.endpoint_url
    }
    with FunctionProcess(environ) as gateway:
        gateway.wait_ready()
    assert not any(fault.times for fault in proxy.faults)
