"""A client that leaves frees its sequences at every stage within a second, in every API, plain or streaming.

The sender of an event may come back for a few seconds, in which its answer goes on.

It runs on a local platform, so the client's leaving passes the ingress and the gateway's queue-proxy. The stages sleep, so that
no answer ends by itself meanwhile.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest
from functions.gateway.answers.deduplication import ABANDONED_SECONDS
from knative.commands.local_pods import read_metrics
from knative.local.platform import Platform
from knative.local.serving.revisions import Revision
from knative.render.services import services
from tests.support.functions.served import serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.published import Published

FREED_SECONDS = 1.0
COMES_BACK_SECONDS = {"CloudEvents": ABANDONED_SECONDS}  # in which an answer goes on for a client that asks again
MEASURING_SECONDS = 0.5  # to read the metrics of all stages on a busy machine
TOKENS = 100
STEP_SECONDS = 0.1  # of each stage, so that an answer takes half a minute
PROMPT = "The capital of France is"


def openai(path: str, stream: bool, **body: Any) -> tuple[str, dict[str, str], bytes]:
    asked = {"model": "tiny", "max_tokens": TOKENS, "stream": stream, **body}
    return path, {"content-type": "application/json"}, json.dumps(asked).encode()


def event(stream: bool) -> tuple[str, dict[str, str], bytes]:
    headers, pieces = to_binary_http(
        json_event(EventType.GENERATE_REQUEST, "tests", GenerateRequest(PROMPT, max_tokens=TOKENS))
    )
    return "/", {**headers, "accept": "text/event-stream" if stream else "application/cloudevents+json"}, b"".join(pieces)


REQUESTS = {
    f"{name}, {'streaming' if stream else 'plain'}": request
    for stream in (False, True)
    for name, request in {
        "chat": openai("/v1/chat/completions", stream, messages=[{"role": "user", "content": PROMPT}]),
        "completions": openai("/v1/completions", stream, prompt=PROMPT),
        "CloudEvents": event(stream),
    }.items()
}


async def send(url: str, path: str, headers: dict[str, str], body: bytes) -> asyncio.StreamWriter:
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [f"POST {path} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "content-length"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
    return writer


async def held(stages: list[Revision]) -> list[float]:
    """The number of sequences at each stage."""
    pods = [pod for stage in stages for pod in stage.ready_pods]
    samples = await asyncio.gather(*(asyncio.to_thread(read_metrics, {"metrics_port": pod.metrics_port}) for pod in pods))
    return [sample["lamina_stage_sequences"] for sample in samples]


async def until_held(stages: list[Revision], number: int, seconds: float) -> float:
    """Waits until every stage holds so many sequences. Returns the seconds that it took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while await held(stages) != [number] * len(stages):
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def freed_seconds(platform: Platform, stages: list[Revision]) -> dict[str, float]:
    """Seconds from when a client left until its sequence was freed, by request."""
    found = {}
    for name, (path, headers, body) in REQUESTS.items():
        writer = await send(platform.url("tiny"), path, headers, body)
        await until_held(stages, 1, 20.0)
        writer.close()
        found[name] = await until_held(stages, 0, 20.0)
    return found


def test_a_client_that_leaves_frees_its_sequence_at_every_stage_within_a_second(published: Published, tmp_path: Path) -> None:
    async def scenario() -> dict[str, float]:
        pipeline = tiny_pipeline(published, layer_group="sleep", sleep_seconds=[STEP_SECONDS] * 3)
        async with serving(tmp_path, published, services(pipeline)) as platform, asyncio.timeout(240):
            stages = [revision for (revision,) in stage_revisions(platform, pipeline)]
            first = await send(platform.url("tiny"), *REQUESTS["chat, streaming"])
            await until(lambda: all(stage.ready_pods for stage in stages))
            await until_held(stages, 1, 60.0)
            first.close()
            await until_held(stages, 0, 20.0)
            return await freed_seconds(platform, stages)

    took = asyncio.run(scenario())
    assert set(took) == set(REQUESTS)
    late = {
        name: seconds
        for name, seconds in took.items()
        if seconds > FREED_SECONDS + MEASURING_SECONDS + COMES_BACK_SECONDS.get(name.partition(",")[0], 0.0)
    }
    assert not late, took
