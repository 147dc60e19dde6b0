"""The cost of a network between pods for the real pipeline: real layers, and a relay before every pod.

Each network is measured with one question at a time and sixteen, and compared with `plan`'s prediction from the passes without
a network. Three remedies are measured, each alone: draft tokens, hidden states in 8 bits, and the same model in fewer stages.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final, Literal

import aiohttp
import msgspec
import yaml
from rich.console import Console

from bench.evaluation.emulated import passes_of
from bench.pipeline import ALWAYS_ONE, local_spec
from bench.report import table
from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.local.kubelet.pods import LocalPod
from knative.local.platform import ROOT, Platform, PlatformOptions, running_platform
from knative.local.proxies.network import EmulatedNetwork
from knative.render.services import services
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.sizing import Link, StagePlan, network_plan, plan_stages
from storage.store.object_store import ObjectStore

NETWORKS: Final = (
    *(EmulatedNetwork(delay) for delay in (0.0, 0.001, 0.005, 0.02, 0.05)),
    *(EmulatedNetwork(0.0, rate) for rate in (1.25e9, 1.25e8, 1.25e7)),  # 10, 1 and 0.1 Gbit/s in bytes
)
AT_ONCE: Final = (1, 16)
_NEARLY_NONE: Final = 1e-6  # seconds of delay without a network: its relays run too, so that their own cost cancels out
_DTYPE: Final = "bfloat16"
_MICRO_BATCH: Final = 8
_QUESTIONS: Final = ROOT / "bench" / "data" / "quoting.yaml"
_READY_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings of a pipeline against a slow network."""

    draft_tokens: int = 0
    wire_dtype: Literal["int8"] | None = None
    stages: int = 3


NOTHING: Final = Remedy()
REMEDIES: Final = {
    "drafts": Remedy(draft_tokens=16),
    "8 bits": Remedy(wire_dtype="int8"),
    "two stages": Remedy(stages=2),
}


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one network, one pipeline and one number of questions at a time."""

    delay_seconds: float
    bytes_per_second: float | None
    draft_tokens: int
    wire_dtype: Literal["int8"] | None = None
    stages: int = NOTHING.stages
    at_once: int
    prompt_tokens: float = 0.0  # mean
    answer_tokens: float = 0.0  # mean
    tokens_per_second: float
    step_seconds: tuple[float, ...]  # of a pass of each stage, mean

    @property
    def remedy(self) -> Remedy:
        return Remedy(self.draft_tokens, self.wire_dtype, self.stages)


@dataclass(frozen=True, slots=True)
class Lengths:
    questions: int = 16
    max_tokens: int = 48


def file_name(network: EmulatedNetwork, remedy: Remedy, lengths: Lengths) -> str:
    rate = "any" if network.bytes_per_second is None else f"{network.bytes_per_second:g}"
    pipeline = f"drafts-{remedy.draft_tokens}"
    if remedy.wire_dtype is not None:
        pipeline += f"-{remedy.wire_dtype}"
    if remedy.stages != NOTHING.stages:
        pipeline += f"-{remedy.stages}"
    return f"network/{network.delay_seconds:g}s-{rate}-{pipeline}-{lengths.questions}x{lengths.max_tokens}.yaml"


def measure(network: EmulatedNetwork, remedy: Remedy, lengths: Lengths, store: ObjectStore, logs: Path) -> list[Measured]:
    """A result for each of `AT_ONCE`."""
    manifest = ensure_published(store, None, _DTYPE, Console(quiet=True))
    local = local_pipeline(store, manifest, remedy.stages, _spec(manifest.name, remedy), {})
    logs.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_measured(local, network, remedy, lengths, logs))


async def _measured(
    local: LocalPipeline, network: EmulatedNetwork, remedy: Remedy, lengths: Lengths, logs: Path
) -> list[Measured]:
    relayed = EmulatedNetwork(_NEARLY_NONE) if network == EmulatedNetwork() else network
    options = PlatformOptions(secrets=local.secrets, logs=logs, network=relayed)
    async with running_platform(options, services(local.pipeline)) as platform:
        url = platform.url(local.pipeline.spec.name)
        async with asyncio.timeout(_READY_SECONDS):
            while not all(revision.ready_pods for each in platform.services.values() for revision in each.revisions):
                await asyncio.sleep(0.1)
        questions = yaml.safe_load(_QUESTIONS.read_text(encoding="utf-8"))[: lengths.questions]
        await _ask(url, local.pipeline.spec.model.name, questions[:1], 4, 1)
        found = []
        for at_once in AT_ONCE:
            before = await _passes(local, platform)
            asked = questions[: max(2, lengths.questions // 4)] if at_once == 1 else questions
            usages, seconds = await _ask(url, local.pipeline.spec.model.name, asked, lengths.max_tokens, at_once)
            after = await _passes(local, platform)
            steps = tuple((b[0] - a[0]) / max(1.0, b[1] - a[1]) for a, b in zip(before, after, strict=True))
            found.append(
                Measured(
                    delay_seconds=network.delay_seconds,
                    bytes_per_second=network.bytes_per_second,
                    draft_tokens=remedy.draft_tokens,
                    wire_dtype=remedy.wire_dtype,
                    stages=remedy.stages,
                    at_once=at_once,
                    prompt_tokens=fmean(each["prompt_tokens"] for each in usages),
                    answer_tokens=fmean(each["completion_tokens"] for each in usages),
                    tokens_per_second=sum(each["completion_tokens"] for each in usages) / seconds,
                    step_seconds=steps,
                )
            )
        return found


async def _ask(
    url: str, model: str, questions: Sequence[str], max_tokens: int, at_once: int
) -> tuple[list[dict[str, int]], float]:
    """Asks greedily. Returns the usage of each answer, and the seconds of all. Raises aiohttp.ClientError."""
    turns = asyncio.Semaphore(at_once)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, timeout=timeout, raise_for_status=True) as session:

        async def one(question: str) -> dict[str, int]:
            messages = [{"role": "user", "content": question}]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
            async with turns, session.post("/v1/chat/completions", json=body) as reply:
                usage: dict[str, int] = (await reply.json())["usage"]
                return usage

        began = time.perf_counter()
        usages = await asyncio.gather(*map(one, questions))
        return usages, time.perf_counter() - began


async def _passes(local: LocalPipeline, platform: Platform) -> list[tuple[float, float]]:
    def pods(name: str) -> list[LocalPod]:
        service = platform.services[local.pipeline.spec.namespace, name]
        return [pod for revision in service.revisions for pod in revision.ready_pods]

    return [await asyncio.to_thread(passes_of, pods(name)) for name in local.pipeline.stage_names]


def _spec(model: str, remedy: Remedy) -> PipelineSpec:
    return local_spec(
        "network",
        model={"name": model, "dtype": _DTYPE},
        stages=remedy.stages,
        wire_dtype=remedy.wire_dtype,
        stage={"resources": {"memory": "2Gi"}, "kv_cache": "256Mi", "autoscaling": ALWAYS_ONE},
        gateway={
            "micro_batch_sequences": _MICRO_BATCH,
            "draft_tokens": remedy.draft_tokens,
            "prefix_sharing": "pipeline",
            "access_log": "off",
            "autoscaling": ALWAYS_ONE,
        },
    )


def stage_plans(store: ObjectStore) -> tuple[StagePlan, ...]:
    """The stages without a remedy."""
    manifest = ensure_published(store, None, _DTYPE, Console(quiet=True))
    local = local_pipeline(store, manifest, NOTHING.stages, _spec(manifest.name, NOTHING), {})
    return plan_stages(local.shape, local.pipeline.cut)


def network_table(plans: Sequence[StagePlan], results: Sequence[Measured]) -> tuple[str, str]:
    """The table, and a sentence about the prediction's error."""
    by_key = {(one.delay_seconds, one.bytes_per_second, one.remedy, one.at_once): one for one in results}
    rows, worst = [], 0.0
    for one in (each for each in results if each.remedy == NOTHING):
        near = by_key.get((0.0, None, NOTHING, one.at_once))
        if near is None:
            continue
        said = predicted(plans, near, Link(one.delay_seconds, one.bytes_per_second))
        error = said / one.tokens_per_second - 1
        worst = max(worst, abs(error))
        remedied = [by_key.get((one.delay_seconds, one.bytes_per_second, each, one.at_once)) for each in REMEDIES.values()]
        rate = "any" if one.bytes_per_second is None else f"{one.bytes_per_second * 8 / 1e9:g}"
        cells = [
            f"{each.tokens_per_second:.1f} ({each.tokens_per_second / one.tokens_per_second:.2f} ×)" if each else "–"
            for each in remedied
        ]
        share = f"{one.tokens_per_second / near.tokens_per_second:.2f}"
        told = [f"{one.delay_seconds * 1e3:g} ms", rate, one.at_once, f"{one.tokens_per_second:.1f}", share, f"{said:.1f}"]
        rows.append([*told, f"{error:+.0%}", *cells])
    columns = ["delay each way", "Gbit/s", "at once", "tokens/s", "share of none", "plan says", "error", *REMEDIES]
    return table(columns, rows), f"The prediction is off by at most {worst:.0%} (wanted: 15 %)."


def predicted(plans: Sequence[StagePlan], near: Measured, link: Link) -> float:
    """Predicted tokens a second with `link`, from the measurement `near` without a network.

    A round takes what `plan` says, and the time beyond passes that it took in `near`. `plan` knows rounds only, so prompts are
    added: one conversation waits for its prompt on all links in turn; of many, each link carries one at a time.
    """
    alone = network_plan(plans, near.step_seconds, near.at_once, _MICRO_BATCH, Link(0.0, None))
    beside = max(0.0, near.at_once / near.tokens_per_second - alone.round_seconds)
    steps = [step + beside / len(plans) for step in near.step_seconds]
    said = network_plan(plans, steps, near.at_once, _MICRO_BATCH, link)
    if link.bytes_per_second is None:
        return said.tokens_per_second
    waited_for = said.bytes_per_token if near.at_once == 1 else max(plan.hop_bytes_per_token for plan in plans)
    prompt = near.prompt_tokens * waited_for / link.bytes_per_second
    return near.answer_tokens / (near.answer_tokens / said.tokens_per_second + prompt)
