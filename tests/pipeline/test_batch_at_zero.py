"""A gateway that may go to zero stays while a batch is open, though nobody asks, and goes to zero after it."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from functions.gateway.jobs.files import EVERYBODY, JobObjects
from knative.local.platform import Platform
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from storage.store.payload_store import PayloadStore
from tests.support.functions.served import serving, tiny_pipeline
from tests.support.storage.published import Published

LINES: Final = 12
TOKENS: Final = 100
LEAST_SECONDS: Final = 12.5  # that the batch takes: more than twice the time after which an idle gateway goes to zero
WAIT_SECONDS: Final = 300.0


def create_batch(url: str) -> str:
    body = {"model": "tiny", "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True}
    lines = [json.dumps({"custom_id": str(number), "url": "/v1/completions", "body": body}) for number in range(LINES)]
    with httpx.Client(base_url=f"{url}/v1", timeout=120) as client:
        file = client.post("/files", files={"file": ("input.jsonl", "\n".join(lines))}, data={"purpose": "batch"}).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch: dict[str, Any] = client.post("/batches", json=asked).json()
    return str(batch["id"])


def gateways(platform: Platform, pipeline: ResolvedPipeline) -> int:
    return sum(len(revision.ready_pods) for revision in platform.services["default", pipeline.spec.name].revisions)


@pytest.mark.timeout(600)
def test_a_batch_is_answered_though_nobody_asks(tmp_path: Path, published: Published) -> None:
    slow = tiny_pipeline(published, layer_group="sleep", sleep_seconds=0.05)
    gateway = msgspec.structs.replace(slow.spec.gateway, jobs="jobs")
    pipeline = ResolvedPipeline(msgspec.structs.replace(slow.spec, gateway=gateway), slow.cut, published.manifest.digest)

    async def run() -> None:
        async with serving(tmp_path, published, services(pipeline)) as platform:
            id_ = await asyncio.to_thread(create_batch, platform.url(pipeline.spec.name))
            began = time.monotonic()
            with PayloadStore(published.store) as store:
                ends = JobObjects(store, "jobs/tiny")
                while not await asyncio.to_thread(ends.exists, f"{EVERYBODY}/ends/{id_}.json"):
                    assert gateways(platform, pipeline) > 0, "the gateway went to zero, and its batch stays unanswered"
                    assert time.monotonic() - began < WAIT_SECONDS, "the batch does not end"
                    await asyncio.sleep(0.5)
            assert time.monotonic() - began > LEAST_SECONDS, "the batch was too short to show anything"
            ended = time.monotonic()
            while gateways(platform, pipeline):
                assert time.monotonic() - ended < WAIT_SECONDS, "the gateway does not go to zero after its batch"
                await asyncio.sleep(0.5)

    asyncio.run(run())
