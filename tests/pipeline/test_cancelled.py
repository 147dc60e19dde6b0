"""A client that leaves frees its sequences at every stage long before they would end, in every API, plain or streaming.

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
from knative.local.serving.revisions import Revision
from knative.render.services import services
from tests.support.functions.metrics import pod_metrics
from tests.support.functions.served import serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.published import Published

TOKENS = 200
STEP_SECONDS = 0.25  # of each stage, so that an answer takes two and a half minutes
FREED_SECONDS = 60.0  # usually one, and a few more for the sender of an event
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
    samples = await asyncio.gather(*map(pod_metrics, pods))
    return [sample["lamina_stage_sequences"] for sample in samples]


async def until_held(stages: list[Revision], number: int, what: str) -> None:
    """Waits until every stage holds so many sequences."""
    deadline = time.monotonic() + FREED_SECONDS
    while (holding := await held(stages)) != [number] * len(stages):
        assert time.monotonic() < deadline, f"{what}: {holding} sequences at the stages"
        await asyncio.sleep(0.02)


def test_a_client_that_leaves_frees_its_sequence_at_every_stage(published: Published, tmp_path: Path) -> None:
    async def scenario() -> None:
        pipeline = tiny_pipeline(published, layer_group="sleep", sleep_seconds=[STEP_SECONDS] * 3)
        async with serving(tmp_path, published, services(pipeline)) as platform, asyncio.timeout(280):
            stages = [revision for (revision,) in stage_revisions(platform, pipeline)]
            first = await send(platform.url("tiny"), *REQUESTS["chat, streaming"])
            await until(lambda: all(stage.ready_pods for stage in stages))
            await until_held(stages, 1, "the first answer")
            first.close()
            await until_held(stages, 0, "after its client has left")
            for name, request in REQUESTS.items():
                writer = await send(platform.url("tiny"), *request)
                await until_held(stages, 1, name)
                writer.close()
                await until_held(stages, 0, f"{name}, after its client has left")

    asyncio.run(scenario())
