"""Scale-in, and a change of everything, while the pipeline answers: nothing fails, nothing is wrong, nothing crosses over.

Real processes of a tiny model; every answer is held against the whole model's. `make test-changes` makes all eight changes
under 24 streams, `make test` one of them under four.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eventing.wire.generation import GenerateResponse
from knative.commands.ask import AskFailed, Question, stream_answer
from knative.commands.local_pods import read_metrics
from knative.local.kubelet.pods import LocalPod, Phase
from knative.local.platform import Platform
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.cut import parse_cut
from knative.spec.pipeline_spec import Autoscaling, GatewayAutoscaling, GatewaySpec, ModelSpec, NetworkSpec, TLSSpec
from storage.models.model_repository import ModelManifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.certificates import CertificateAuthority, write
from tests.support.functions.served import PROMPTS, Conversations, serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.published import Published, published_model, save_checkpoint

LONG = 100
SHORT = 24
CONVERSATIONS = 6


def test_scale_in_amid_many_generations(published: Published, tmp_path: Path, wide: bool) -> None:
    generations = 200 if wide else 120

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
            asked = asyncio.gather(*(conversations.ask(url, number, LONG) for number in range(generations)))
            await until(lambda: conversations.begun >= generations // 10)
            pods = list(middle.pods)
            middle.autoscaler.settings = replace(middle.autoscaler.settings, min_scale=1, max_scale=1)
            await until(lambda: sum(pod.leaving for pod in pods) == 2)
            assert conversations.answered < generations // 2, "scaled in too late to disturb anything"
            held = asyncio.gather(*(last_held(pod) for pod in pods if pod.leaving))
            await asked
            assert await held == [0, 0], "a pod left with sequences in it"
            assert conversations.answered == generations
            assert conversations.replays >= 1, "no sequence was on a pod that left"

    asyncio.run(scenario())


async def last_held(pod: LocalPod) -> float:
    """How many sequences a leaving pod said last that it holds."""
    held = -1.0
    while pod.phase is not Phase.GONE:
        samples = await asyncio.to_thread(read_metrics, {"metrics_port": pod.metrics_port})
        held = held if samples is None else samples.get("lamina_stage_sequences", held)
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
            await until(lambda: all(new.ready_pods and not old.pods for old, new in revisions))
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
                await until(lambda: all(each[-1].ready_pods for each in stage_revisions(platform, plain)))
                await another_round(conversations)
                await platform.apply([gateway])
                assert len(service.revisions) == number + 1
                await until(lambda: bool(service.revisions[-1].ready_pods) and not service.revisions[-2].pods)
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
            await until(lambda: not any(revision.pods for revision in ending))
            await another_round(conversations)
            assert new_gateway.ready_pods
            assert all(revision.ready_pods for (revision,) in stage_revisions(platform, new))

    asyncio.run(scenario())


ANSWER_TOKENS = 60
PAUSE_SECONDS = 0.2
CHANGE_SECONDS = 120.0  # within which a change is done, on a busy machine; a new token takes three
API_KEY = "a-key-of-a-client"


@dataclass
class Streams:
    """Clients that stream one answer after another, as CloudEvents, which name no model. They always show an API key."""

    url: str
    answers: list[tuple[float, str, tuple[int, ...]]] = field(default_factory=list)  # began, prompt, tokens; by their ends
    broken: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def converse(self, number: int) -> None:
        while not self.over.is_set():
            await self.ask(PROMPTS[number % len(PROMPTS)])
            number += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def ask(self, prompt: str) -> None:
        began, text = time.monotonic(), ""
        try:
            async for part in stream_answer(self.url, Question(prompt, ANSWER_TOKENS, chat=False, api_key=API_KEY)):
                if isinstance(part, GenerateResponse):
                    assert part.text == text, "the stream and its last event differ"
                    self.answers.append((began, prompt, tuple(part.token_ids)))
                else:
                    text += part.text
        except AskFailed as error:
            self.broken.append(f"{prompt!r}: {error}")

    async def version(self) -> dict[str, tuple[int, ...]]:
        """The answers that begin from now on, one for each prompt."""
        now, found = time.monotonic(), dict[str, set[tuple[int, ...]]]()
        seen = len(self.answers)

        def complete() -> bool:
            found.clear()
            for began, prompt, tokens in self.answers[seen:]:
                if began > now:
                    found.setdefault(prompt, set()).add(tokens)
            return len(found) == len(PROMPTS)

        await until(complete, CHANGE_SECONDS)
        assert {len(answers) for answers in found.values()} == {1}, "a prompt has several answers"
        return {prompt: answers.pop() for prompt, answers in found.items()}


def with_changes(base: ResolvedPipeline, manifest: ModelManifest | None = None, **changes: Any) -> ResolvedPipeline:
    spec = msgspec.structs.replace(base.spec, **changes)
    if manifest is not None:
        spec = msgspec.structs.replace(spec, model=ModelSpec(name=manifest.name, dtype=manifest.dtype))
    return ResolvedPipeline(spec, parse_cut(str(spec.cut)), base.weights_digest if manifest is None else manifest.digest)


def is_settled(platform: Platform, pipeline: ResolvedPipeline) -> bool:
    """Whether pods of `pipeline` alone run: of the newest revision of each of its Services, and no others."""
    gateways = pipeline.spec.gateway.autoscaling.min_scale
    wanted = {pipeline.stage_name(index): 1 for index in range(len(pipeline.cut))} | {"tiny": gateways}
    for (_, name), service in platform.services.items():
        *old, newest = service.revisions
        if any(revision.pods for revision in old) or (newest.pods and name not in wanted):
            return False
        if len(newest.ready_pods) != wanted.get(name, 0):
            return False
    return True


async def change(platform: Platform, pipeline: ResolvedPipeline, rotation: str = "0") -> None:
    """Applies a pipeline under load, and waits until its pods alone run. rotation: as the deployer counts it."""
    manifests = services(pipeline)
    for manifest in manifests:
        manifest["spec"]["template"]["metadata"]["annotations"]["lamina.dev/rotation"] = rotation
    await platform.apply(manifests)
    await until(lambda: is_settled(platform, pipeline), CHANGE_SECONDS)


async def rotate(platform: Platform, secret: dict[str, str], pipeline: ResolvedPipeline, new: str) -> None:
    """As knative/cluster/pipeline_token.py does it on a cluster."""
    old = secret["token"]
    for state, tokens in enumerate(({"token": old, "second": new}, {"token": new, "second": old}, {"token": new}), 1):
        secret.clear()
        secret.update(tokens)
        await change(platform, pipeline, f"{new}-{state}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_is_changed_and_changed_back_under_streams(tmp_path: Path, wide: bool) -> None:
    """No stream breaks, no answer mixes two versions, and each change is done in time."""

    async def scenario(published: Published, other_dtype: ModelManifest, other_model: ModelManifest) -> None:
        tiny = tiny_pipeline(published)
        quick = {"window_seconds": 6, "scale_down_delay_seconds": 0}
        stage = msgspec.structs.replace(tiny.spec.stage, autoscaling=Autoscaling(**quick, max_scale=1))
        one, two = (
            GatewaySpec(autoscaling=GatewayAutoscaling(**quick, min_scale=gateways, max_scale=gateways)) for gateways in (1, 2)
        )
        base = with_changes(tiny, stage=stage, gateway=one)
        limits = msgspec.structs.replace(one, client_requests_per_minute=100_000, client_max_tokens=1000)
        changes = {"model": with_changes(base, other_model)}
        if wide:
            changes |= {
                "number of gateways": with_changes(base, gateway=two),
                "image": with_changes(base, image="lamina:another"),
                "dtype": with_changes(base, other_dtype),
                "cut": with_changes(base, cut="0:3,3:6"),
                "token": base,
                "keys": with_changes(base, gateway=msgspec.structs.replace(one, api_keys_secret="tiny-keys")),
                "limits": with_changes(base, gateway=limits),
            }
        expected = {prompt: tuple(published.expected(prompt, ANSWER_TOKENS)) for prompt in PROMPTS}
        versions, table = [expected], list[tuple[str, float, float, int, int]]()
        secret = {"token": "secret"}
        secrets = {"tiny-pipeline": secret, "tiny-keys": {"api-keys": API_KEY}}
        async with serving(tmp_path, published, services(base), secrets=secrets) as platform, asyncio.TaskGroup() as group:
            streams = Streams(platform.url("tiny"))
            for number in range(24 if wide else 4):
                group.create_task(streams.converse(number))
            assert await streams.version() == expected
            for name, changed in changes.items():
                answered, broken, seconds = len(streams.answers), len(streams.broken), []
                for wanted in (changed, base):
                    began = time.monotonic()
                    if name == "token":
                        await rotate(platform, secret, base, f"token-{len(seconds)}")
                    else:
                        await change(platform, wanted)
                    seconds.append(time.monotonic() - began)
                    versions.append(await streams.version())
                assert versions[-1] == expected, name
                assert (versions[-2] != expected) == (name in ("dtype", "model")), name
                table.append((name, *seconds, len(streams.answers) - answered, len(streams.broken) - broken))
                print("{:20} {:5.1f} s, back {:5.1f} s, {:5} streams, {} broken".format(*table[-1]), flush=True)
            streams.over.set()
        assert streams.broken == []
        mixed = [each for each in streams.answers if all(version[each[1]] != each[2] for version in versions)]
        assert not mixed

    with published_model(tmp_path) as published:
        store = ObjectStore(published.store)
        save_checkpoint(tmp_path / "other", seed=1)
        other_dtype = publish(tmp_path / "checkpoint", store, "tiny", "bfloat16")
        other_model = publish(tmp_path / "other", store, "another", "float32")
        asyncio.run(scenario(published, other_dtype, other_model))
