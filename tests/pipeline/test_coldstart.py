"""Pods from zero: right answers, honest phases, fresh nonces, weights out of the cache the second time."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from eventing.http.sse import SSEDecoder
from eventing.wire.generation import ProgressEvent
from functions.hosting.startup import PHASES
from knative.commands.ask import Question, stream_answer
from tests.support.functions.served import answer_to
from tests.support.knative.cold_pipeline import cold_pipeline, pods_of
from tests.support.storage.published import CUT, Published
from tests.support.storage.storage import FaultProxy

DEADLINE_SECONDS = 90.0
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
