"""Scale-in, a new revision and a new cut while the pipeline answers: nothing fails, nothing is wrong, nothing crosses over.

Real processes of a tiny model; every answer is held against the whole model's.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from knative.commands.local_pods import read_metrics
from knative.local.kubelet.pods import LocalPod, Phase
from knative.local.platform import Platform
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.pipeline_spec import NetworkSpec, TLSSpec
from tests.support.certificates import CertificateAuthority, write
from tests.support.functions.served import Conversations, serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.published import Published

GENERATIONS = 200
LONG = 100
SHORT = 24
CONVERSATIONS = 12


def test_scale_in_amid_two_hundred_generations(published: Published, tmp_path: Path) -> None:
    async def scenario() -> None:
        pipeline = tiny_pipeline(published)
        manifests = services(pipeline)
        manifests[1]["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/min-scale"] = "3"
        conversations = Conversations(published)
        conversations.prepare(LONG)
        async with serving(tmp_path, published, manifests) as platform:
            middle = stage_revisions(platform, pipeline)[1][0]
            await until(lambda: len(middle.ready_pods) == 3)
            url = platform.url("tiny")
            asked = asyncio.gather(*(conversations.ask(url, number, LONG) for number in range(GENERATIONS)))
            await until(lambda: conversations.begun >= GENERATIONS // 10)
            pods = list(middle.pods)
            middle.autoscaler.settings = replace(middle.autoscaler.settings, min_scale=1, max_scale=1)
            await until(lambda: sum(pod.leaving for pod in pods) == 2)
            assert conversations.answered < GENERATIONS // 2, "scaled in too late to disturb anything"
            held = asyncio.gather(*(last_held(pod) for pod in pods if pod.leaving))
            await asked
            assert await held == [0, 0], "a pod left with sequences in it"
            assert conversations.answered == GENERATIONS
            assert conversations.replays >= 1, "no sequence was on a pod that left"

    asyncio.run(scenario())


async def last_held(pod: LocalPod) -> float:
    """How many sequences a leaving pod said last that it holds."""
    held = -1.0
    while pod.phase is not Phase.GONE:
        samples = await asyncio.to_thread(read_metrics, {"metrics_port": pod.metrics_port})
        held = samples.get("lamina_stage_sequences", held)
        await asyncio.sleep(0.05)
    return held


@asynccontextmanager
async def under_load(
    published: Published, pipeline: ResolvedPipeline, folder: Path, **options: Any
) -> AsyncIterator[tuple[Platform, Conversations]]:
    """A pipeline that answers conversations all the time. Fails at the end if a sequence was computed again."""
    conversations = Conversations(published)
    conversations.prepare(SHORT)
    async with serving(folder, published, services(pipeline), **options) as platform, asyncio.TaskGroup() as group:
        url = platform.url("tiny")
        for number in range(CONVERSATIONS):
            group.create_task(conversations.keep_asking(url, number, SHORT))
        await another_round(conversations)
        yield platform, conversations
        conversations.over.set()
    assert conversations.replays == 0


async def another_round(conversations: Conversations) -> None:
    answered = conversations.answered
    await until(lambda: conversations.answered >= answered + CONVERSATIONS)


def test_a_new_revision_under_load(published: Published, tmp_path: Path) -> None:
    """Sequences end on the pods where they began, so none is computed again; old pods end after their last sequence."""

    async def scenario() -> None:
        pipeline, changed = tiny_pipeline(published), tiny_pipeline(published, idle_sequence_seconds=500)
        assert changed.fingerprint == pipeline.fingerprint
        async with under_load(published, pipeline, tmp_path) as (platform, conversations):
            await platform.apply(services(changed))
            revisions = stage_revisions(platform, pipeline)
            assert [len(of_stage) for of_stage in revisions] == [2, 2, 2]
            await until(lambda: all(new.ready_pods and not old.pods for old, new in revisions), 60)
            await another_round(conversations)

    asyncio.run(scenario())


def test_tls_between_pods_is_turned_on_and_off_under_load(published: Published, tmp_path: Path) -> None:
    """Stages change before the gateway, as `deploy` does it: the old gateway reaches new stages without TLS."""
    folder = write(CertificateAuthority().secret("tiny.default"), tmp_path / "tiny-tls")

    async def scenario() -> None:
        plain = tiny_pipeline(published)
        secured = replace(plain, spec=msgspec.structs.replace(plain.spec, network=NetworkSpec(tls=TLSSpec(secret="tiny-tls"))))
        async with under_load(published, plain, tmp_path, secret_folders={"tiny-tls": folder}) as (platform, conversations):
            service = platform.services["default", "tiny"]
            for number, pipeline in enumerate((secured, plain), 1):
                *stages, gateway = services(pipeline)
                await platform.apply(stages)
                await until(lambda: all(each[-1].ready_pods for each in stage_revisions(platform, plain)), 60)
                await another_round(conversations)
                await platform.apply([gateway])
                assert len(service.revisions) == number + 1
                await until(lambda: bool(service.revisions[-1].ready_pods) and not service.revisions[-2].pods, 60)
                await another_round(conversations)

    asyncio.run(scenario())


def test_a_new_cut_under_load(published: Published, tmp_path: Path) -> None:
    """New stages come up beside the old, the gateway's new revision takes what is new over, and the old ones end at zero."""

    async def scenario() -> None:
        old, new = tiny_pipeline(published), tiny_pipeline(published, cut="0:3,3:6")
        assert new.fingerprint != old.fingerprint
        async with under_load(published, old, tmp_path) as (platform, conversations):
            await platform.apply(services(new))
            old_gateway, new_gateway = platform.services["default", "tiny"].revisions
            ending = [*(revision for (revision,) in stage_revisions(platform, old)), old_gateway]
            await until(lambda: not any(revision.pods for revision in ending), 60)
            await another_round(conversations)
            assert new_gateway.ready_pods
            assert all(revision.ready_pods for (revision,) in stage_revisions(platform, new))

    asyncio.run(scenario())
