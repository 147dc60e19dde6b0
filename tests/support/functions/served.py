"""A pipeline of the tiny model on a local platform, with real function processes, and conversations with it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from eventing.wire.generation import GenerateResponse
from knative.commands.ask import Question, stream_answer
from knative.local.kubelet.pods import PodTiming
from knative.local.platform import Platform
from knative.local.serving.revisions import Revision
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.cut import parse_cut
from knative.spec.pipeline_spec import (
    KV_PREFIX,
    Autoscaling,
    GatewaySpec,
    KVStoreSpec,
    ModelSpec,
    PipelineSpec,
    Resources,
    StageSpec,
    StoreSpec,
)
from storage.store.payload_store import PayloadStore
from tests.support.knative.platform import running_platform
from tests.support.storage.published import Published, until_end
from tests.support.storage.tiny_models import greedy

PROMPTS = ("hello", "The capital of France is", "12345", "the the", "x" * 40, "a river", "no", "winter", "?", "north")
TIMING = PodTiming(drain_quiet_seconds=1.0, restart_backoff_seconds=0.2)
_BEGUN_AT_TOKENS = 5


def tiny_pipeline(
    published: Published, cut: str = "0:2,2:4,4:6", wire_dtype: Literal["int8"] | None = None, **stage: Any
) -> ResolvedPipeline:
    """stage: further fields of the spec's stage."""
    scaling = Autoscaling(target=8, window_seconds=6, scale_down_delay_seconds=0, max_scale=3)
    spec = PipelineSpec(
        name="tiny",
        model=ModelSpec(name=published.manifest.name, dtype=published.manifest.dtype),
        cut=cut,
        wire_dtype=wire_dtype,
        image="lamina:local",
        stage=StageSpec(resources=Resources(memory="1536Mi"), kv_cache="16Mi", autoscaling=scaling, **stage),
        gateway=GatewaySpec(
            autoscaling=Autoscaling(
                container_concurrency=0, target=100, window_seconds=6, scale_down_delay_seconds=0, max_scale=1
            )
        ),
        store=StoreSpec(endpoint=published.store.endpoint_url, bucket=published.store.bucket),
    )
    return ResolvedPipeline(spec, parse_cut(cut), published.manifest.digest)


def keeping(pipeline: ResolvedPipeline, published: Published, kv_cache: str = "16Mi") -> ResolvedPipeline:
    """The same pipeline with a KV store, and all clients share. With a small KV cache, idle conversations go to the store."""
    gateway = msgspec.structs.replace(pipeline.spec.gateway, prefix_sharing="pipeline")
    stage = msgspec.structs.replace(pipeline.spec.stage, kv_cache=kv_cache)
    kept = KVStoreSpec(secret=f"{pipeline.spec.name}-kv")
    spec = msgspec.structs.replace(pipeline.spec, kv_store=kept, stage=stage, gateway=gateway)
    return ResolvedPipeline(spec, pipeline.cut, published.manifest.digest)


def kept_objects(published: Published) -> list[str]:
    """Keys of the objects that stages keep of conversations."""
    with PayloadStore(published.store) as store:
        return [found.key for found in store.list(f"{KV_PREFIX}/")]


@asynccontextmanager
async def serving(
    folder: Path, published: Published, manifests: Sequence[dict[str, Any]], timing: PodTiming = TIMING, **options: Any
) -> AsyncIterator[Platform]:
    name = manifests[0]["metadata"]["labels"]["app.kubernetes.io/instance"]
    secrets = {
        f"{name}-pipeline": {"token": "secret"},
        f"{name}-kv": {"key": "ab" * 32},
        "lamina-store": {
            "AWS_ACCESS_KEY_ID": published.store.access_key_id,
            "AWS_SECRET_ACCESS_KEY": published.store.secret_access_key,
        },
    }
    secrets |= options.pop("secrets", {})
    async with running_platform(folder, *manifests, secrets=secrets, timing=timing, **options) as platform:
        yield platform


def stage_revisions(platform: Platform, pipeline: ResolvedPipeline) -> list[list[Revision]]:
    """Revisions of each stage, oldest first."""
    names = [pipeline.stage_name(index) for index in range(len(pipeline.cut))]
    return [platform.services["default", name].revisions for name in names]


async def answer_to(url: str, prompt: str, tokens: int) -> GenerateResponse:
    async for part in stream_answer(url, Question(prompt, tokens, chat=False, timeout_seconds=100)):
        if isinstance(part, GenerateResponse):
            return part
    raise AssertionError("no answer came")


@dataclass
class Conversations:
    """Sends requests and compares every answer with the whole model's. Raises an error for a failed or different answer."""

    published: Published
    answered: int = 0
    begun: int = 0  # answers whose first tokens have come
    replays: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _expected: dict[str, list[int]] = field(default_factory=dict)

    def prepare(self, tokens: int) -> None:
        """Computes the expected answers before the platform runs, because that would block the event loop."""
        for prompt in PROMPTS:
            self._expected[prompt] = greedy(self.published.model, self.published.tokenizer.encode(prompt).ids, tokens)

    async def ask(self, url: str, number: int, tokens: int) -> None:
        prompt, seen = PROMPTS[number % len(PROMPTS)], 0
        async for answer in stream_answer(url, Question(prompt, tokens, chat=False, timeout_seconds=100)):
            if isinstance(answer, GenerateResponse):
                self._check(prompt, tokens, answer)
            else:
                seen += 1
                self.begun += seen == _BEGUN_AT_TOKENS

    def _check(self, prompt: str, tokens: int, answer: GenerateResponse) -> None:
        expected = until_end(self._expected[prompt][:tokens])
        assert list(answer.token_ids) == expected, f"{prompt!r}: {answer.token_ids} instead of {expected}"
        self.answered += 1
        self.replays += answer.timings.replays

    async def keep_asking(self, url: str, number: int, tokens: int) -> None:
        """One answer after another until `over` is set, with pauses that leave other processes the machine."""
        while not self.over.is_set():
            await self.ask(url, number, tokens)
            await asyncio.sleep(0.2)
