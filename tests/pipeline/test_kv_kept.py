"""Conversations outlive their pods: everything goes to zero, and they go on with what the store kept. Real processes, real S3.

Answers are those of the whole model, token for token; what was computed again is counted.
"""

import asyncio
from pathlib import Path
from typing import Final

from eventing.wire.generation import GenerateResponse
from eventing.wire.prefix_chain import BLOCK_TOKENS
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
    await until(lambda: not any(revision.pods for revision in [*revisions, *gateway]), 60)


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
