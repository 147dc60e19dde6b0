"""A network between the pods costs a pipeline of processes what `plan` says it does."""

import asyncio
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from eventing.wire.generation import TokenEvent
from knative.commands.ask import Question, stream_answer
from knative.local.proxies.network import EmulatedNetwork
from knative.render.services import services
from knative.spec.model_shape import published_shape
from knative.spec.sizing import Link, network_plan, plan_stages
from storage.store.object_store import ObjectStore
from tests.support.functions.served import serving, tiny_pipeline
from tests.support.storage.published import Published

STEP_SECONDS = 0.08
DELAY_SECONDS = 0.06
TOKENS = 12


async def seconds_per_token(url: str) -> float:
    times = []
    async for answer in stream_answer(url, Question("The capital of France is", TOKENS, chat=False)):
        if isinstance(answer, TokenEvent):
            times.append(time.perf_counter())
    gaps = sorted(later - earlier for earlier, later in pairwise(times[1:]))
    return gaps[len(gaps) // 4]  # most of the longer ones had to wait for a busy machine


def test_plan_predicts_what_a_delay_between_pods_costs(published: Published, tmp_path: Path) -> None:
    """Passes and delays are so long that a busy machine adds little to each."""
    pipeline = tiny_pipeline(published, layer_group="sleep", sleep_seconds=[STEP_SECONDS] * 3)
    gateway = msgspec.structs.replace(pipeline.spec.gateway, draft_tokens=0)
    pipeline = replace(pipeline, spec=msgspec.structs.replace(pipeline.spec, gateway=gateway))
    plans = plan_stages(published_shape(ObjectStore(published.store), published.manifest), pipeline.cut)

    async def measured() -> float:
        network = EmulatedNetwork(delay_seconds=DELAY_SECONDS, bytes_per_second=1.25e7)
        async with serving(tmp_path, published, services(pipeline), network=network) as platform, asyncio.timeout(120):
            return await seconds_per_token(platform.url("tiny"))

    said = network_plan(plans, [STEP_SECONDS] * 3, 1, 8, Link(DELAY_SECONDS, 1.25e7))
    assert said.round_seconds == pytest.approx(3 * (STEP_SECONDS + 2 * DELAY_SECONDS), rel=0.01)
    assert asyncio.run(measured()) == pytest.approx(said.round_seconds, rel=0.15)
