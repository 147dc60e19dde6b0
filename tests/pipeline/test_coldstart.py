"""Pods from zero: right answers, honest phases, fresh nonces, weights out of the cache the second time.

If the store misbehaves, a request survives what the start survives.
"""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from eventing.http.sse import SSEDecoder
from eventing.wire.generation import ProgressEvent
from functions.hosting.startup import PHASES
from knative.commands.ask import Question, stream_answer
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment, wait_until
from tests.support.functions.served import answer_to
from tests.support.knative.cold_pipeline import cold_pipeline, pods_of
from tests.support.storage.published import CUT, Published
from tests.support.storage.storage import Fault, FaultProxy

DEADLINE_SECONDS = 240.0
PROMPT = "hello"
KEEP_ALIVE = {"LAMINA_KEEP_ALIVE_SECONDS": "0.3"}


async def ask_cold(
    published: Published, proxy: FaultProxy, folder: Path, cache: Path | None
) -> tuple[str, list[dict[str, Any]]]:
    endpoints = dict.fromkeys(range(len(CUT)), proxy.settings.endpoint_url)
    async with cold_pipeline(published, folder, endpoints, cache) as (platform, local):
        answer = await answer_to(platform.url(local.pipeline.spec.name), PROMPT, 8)
        pods = [pods_of(platform, local.pipeline.stage_name(index)) for index in range(len(CUT))]
    assert [len(each) for each in pods] == [1] * len(CUT)
    return answer.text, [each[0]["readiness"] for each in pods]


def cold_answer(
    published: Published, proxy: FaultProxy, folder: Path, cache: Path | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """The answer to a question that is asked with everything at zero, and what the stages' readiness said."""
    return asyncio.run(asyncio.wait_for(ask_cold(published, proxy, folder, cache), DEADLINE_SECONDS))


def layers_read(proxy: FaultProxy) -> int:
    return sum("layer-" in path for _, path in proxy.requests)


def test_phases_follow_one_another(published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    text, said = cold_answer(published, proxy, tmp_path)
    assert text == published.tokenizer.decode(published.expected(PROMPT, 8))
    for each in said:
        phases = each["start_up"]
        assert phases.keys() == set(PHASES)
        assert 0 <= phases["process"] <= phases["import"] <= phases["place"] <= phases["warm_up"]
        assert phases["connect"] <= phases["first_byte"] <= phases["last_byte"] <= phases["place"]
    assert len({each["instance"].rpartition("-")[2] for each in said}) == len(CUT)


def test_a_second_start_reads_no_weights_but_those_that_were_altered_in_the_cache(
    published: Published, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = tmp_path / "weights"
    first, _ = cold_answer(published, proxy, tmp_path, cache)
    assert layers_read(proxy) >= 6
    proxy.requests.clear()
    second, said = cold_answer(published, proxy, tmp_path, cache)
    assert second == first
    assert layers_read(proxy) == 0
    assert all(each["start_up"].keys() == set(PHASES) for each in said)
    for file in cache.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    third, _ = cold_answer(published, proxy, tmp_path, cache)
    assert third == first
    assert layers_read(proxy) >= 6


def test_who_waits_for_a_cold_start_sees_signs_of_life_and_may_ask_for_progress(
    published: Published, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Half of stage 2's weights are held back until both APIs have told so, and a stream without the option has a comment."""
    released, told = threading.Event(), dict[str, list[ProgressEvent]]()
    proxy.on_request = lambda _, path: released.wait(DEADLINE_SECONDS) if "layer-00003" in path else None
    quiet = bytearray()

    def is_loading(progress: ProgressEvent) -> bool:
        return progress.awaits == "start" and progress.stage == 2 and 0 < (progress.percent or 0) < 100

    def note(api: str, progress: ProgressEvent) -> None:
        told.setdefault(api, []).append(progress)
        if len(told) == 2 and all(any(map(is_loading, each)) for each in told.values()) and b":\n\n" in quiet:
            released.set()

    async def with_openai(url: str, *, include_progress: bool) -> str:
        body = {"model": published.manifest.name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_progress": include_progress}
        decoder, text = SSEDecoder(), ""
        async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as reply:
            assert reply.status == 200
            async for piece in reply.content.iter_any():
                if not include_progress:
                    quiet.extend(piece)
                for event in decoder.feed(piece):
                    chunk = {} if event.data == "[DONE]" else msgspec.json.decode(event.data)
                    if "progress" in chunk:
                        assert chunk["choices"] == []
                        note("openai", msgspec.convert(chunk["progress"], ProgressEvent))
                    text += "".join(choice["text"] for choice in chunk.get("choices", ()))
        return text

    async def with_events(url: str) -> str:
        question = Question(PROMPT, 8, chat=False)
        return "".join([token.text async for token in stream_answer(url, question, lambda each: note("events", each))][:-1])

    async def run() -> list[str]:
        endpoints = {1: proxy.settings.endpoint_url}
        async with cold_pipeline(published, tmp_path, endpoints, gateway=KEEP_ALIVE) as (platform, local):
            url = platform.url(local.pipeline.spec.name)
            asked = (with_openai(url, include_progress=True), with_openai(url, include_progress=False), with_events(url))
            return await asyncio.gather(*asked)

    texts = asyncio.run(asyncio.wait_for(run(), DEADLINE_SECONDS))
    assert texts == [published.tokenizer.decode(published.expected(PROMPT, 8))] * 3
    loading = next(filter(is_loading, told["events"]))
    assert loading.text == f"stage 2 of 3 loading, {loading.percent} %"
    assert b"progress" not in quiet


STAGE = 1  # whose store misbehaves: it has layers 2 and 3
WEIGHTS = "layer-0000"


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
