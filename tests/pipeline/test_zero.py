"""At zero: conversations go on with what the store kept, and an open batch keeps its gateway. Real processes, real S3.

Answers are those of the whole model, token for token; what was computed again is counted.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from eventing.wire.generation import GenerateResponse
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.gateway.jobs.files import EVERYBODY, JobObjects
from knative.local.platform import Platform
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from storage.store.payload_store import PayloadStore
from tests.support.functions.served import answer_to, keeping, kept_objects, serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.published import Published

FIRST: Final = "the river " * 5
MORE: Final = " and the sea"
NEW_TOKENS: Final = 24


async def all_at_zero(platform: Platform, pipeline: ResolvedPipeline) -> None:
    revisions = [revision for of_stage in stage_revisions(platform, pipeline) for revision in of_stage]
    gateway = platform.services["default", "tiny"].revisions
    await until(lambda: not any(revision.pods for revision in [*revisions, *gateway]))


def test_everything_at_zero_and_a_conversation_goes_on(published: Published, tmp_path: Path) -> None:
    first_wanted = published.expected(FIRST, NEW_TOKENS)
    follow_up = FIRST + published.tokenizer.decode(first_wanted) + MORE
    follow_up_wanted = published.expected(follow_up, NEW_TOKENS)
    shared = published.tokenizer.encode(FIRST).ids

    async def scenario() -> None:
        pipeline = keeping(tiny_pipeline(published), published)
        async with serving(tmp_path, published, services(pipeline)) as platform:
            url = platform.url("tiny")
            first = await answer_to(url, FIRST, NEW_TOKENS)
            assert list(first.token_ids) == first_wanted
            assert cached(first) == 0
            await all_at_zero(platform, pipeline)
            kept = await asyncio.to_thread(kept_objects, published)
            assert {key.split("/")[2] for key in kept} == {"0-2", "2-4", "4-6"}
            second = await answer_to(url, follow_up, NEW_TOKENS)
            assert list(second.token_ids) == follow_up_wanted
            assert cached(second) >= (len(shared) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            await all_at_zero(platform, pipeline)
            await asyncio.to_thread(spoil, published)
            third = await answer_to(url, follow_up, NEW_TOKENS)
            assert list(third.token_ids) == follow_up_wanted, "what was altered is computed"
            assert cached(third) == 0

    asyncio.run(scenario())


def cached(response: GenerateResponse) -> int:
    return response.usage.prompt_tokens_details.cached_tokens


def spoil(published: Published) -> None:
    with PayloadStore(published.store) as store:
        for key in [found.key for found in store.list("kv/")]:
            data = bytearray(store.get(key))
            data[-1] ^= 1
            store.put(key, bytes(data))


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
    """Pods that are not leaving; on a busy machine one may not be ready for a moment."""
    revisions = platform.services["default", pipeline.spec.name].revisions
    return sum(not pod.leaving for revision in revisions for pod in revision.pods)


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
                while f"{id_}.json" not in await asyncio.to_thread(lambda: list(ends.names(f"{EVERYBODY}/ends/"))):
                    assert gateways(platform, pipeline) > 0, "the gateway went to zero, and its batch stays unanswered"
                    assert time.monotonic() - began < WAIT_SECONDS, "the batch does not end"
                    await asyncio.sleep(0.5)
            assert time.monotonic() - began > LEAST_SECONDS, "the batch was too short to show anything"
            ended = time.monotonic()
            while gateways(platform, pipeline):
                assert time.monotonic() - ended < WAIT_SECONDS, "the gateway does not go to zero after its batch"
                await asyncio.sleep(0.5)

    asyncio.run(run())
