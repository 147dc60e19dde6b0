"""Clients that ask a pipeline, and a killer of its stages."""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Coroutine, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType, Sampling
from eventing.wire.generation import GenerateRequest, GenerateResponse
from knative.local.kubelet.pods import PodTiming
from knative.local.platform import Platform
from knative.local.serving.revisions import Revision
from knative.render.resolved_pipeline import ResolvedPipeline
from tests.support.functions.metrics import pod_metrics
from tests.support.functions.served import stage_revisions
from tests.support.knative.platform import until

CLIENTS: Final = 16
ENDINGS: Final = ("", " hello", " The capital of France is", "x" * 30, " the the the north")
KILL_SECONDS: Final = 2.0
KILL_ANSWERS: Final = 20  # a kill follows after so many answers at the latest, so that a fast machine has enough kills
KILL_TOKENS: Final = 4 * CLIENTS  # no kill follows before so many, or on a slow machine one sequence would meet three in a row
TIMING: Final = PodTiming(restart_backoff_seconds=0.2, restart_backoff_max_seconds=0.2)


def prompt(number: int) -> str:
    """No two are alike; those with the same ending have equally many tokens."""
    return f"{number:03}{ENDINGS[number % len(ENDINGS)]}"


def sampling(number: int) -> Sampling:
    """Every other one draws."""
    return Sampling(temperature=float(number % 2), seed=number)


async def ask(session: aiohttp.ClientSession, url: str, number: int, new_tokens: int) -> GenerateResponse:
    drawn = sampling(number)
    request = GenerateRequest(prompt(number), max_tokens=new_tokens, temperature=drawn.temperature, seed=drawn.seed)
    headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "tests", request))
    async with session.post(url, data=b"".join(pieces), headers=headers) as reply:
        body = await reply.read()
        assert reply.status == 200, f"{prompt(number)!r}: {reply.status} {body.decode()}"
        return msgspec.json.decode(body, type=GenerateResponse)


async def ask_all(url: str, numbers: Sequence[int], new_tokens: int, answers: dict[int, GenerateResponse]) -> None:
    """Asks for all numbers. Each client asks again as soon as it is answered."""
    left = iter(numbers)

    async def keep_asking(session: aiohttp.ClientSession) -> None:
        for number in left:
            answers[number] = await ask(session, url, number, new_tokens)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(keep_asking(session))


async def killing(
    platform: Platform, pipeline: ResolvedPipeline, asking: Coroutine[Any, Any, None], answers: Sized
) -> "Killer":
    """Runs `asking`, which adds to `answers`, and kills stages until it has ended."""
    (gateway,) = platform.services["default", "tiny"].revisions
    killer = Killer(gateway, [revision for (revision,) in stage_revisions(platform, pipeline)])
    asked = asyncio.create_task(asking)
    await killer.kill_until_done(asked, answers)
    await asked
    return killer


@dataclass
class Killer:
    """Kills a stage that the dice choose, again and again."""

    gateway: Revision
    stages: list[Revision]
    running: list[float] = field(default_factory=list)  # before each kill: sequences that the gateway was answering
    replays: list[float] = field(default_factory=list)  # before each kill, and at the end: sequences computed anew so far
    _dice: random.Random = field(default_factory=lambda: random.Random(6))

    @property
    def kills_that_cost(self) -> int:
        """Kills after which a running sequence was replayed."""
        costs = (after > before for before, after in itertools.pairwise(self.replays))
        return sum(cost and running > 0 for cost, running in zip(costs, self.running, strict=True))

    async def kill_until_done(self, asked: asyncio.Task[None], answers: Sized) -> None:
        await until(lambda: asked.done() or len(answers) > 0)
        while not asked.done():
            await self._kill(self._dice.choice(self.stages))
            await self._rest(asked, answers)
        await self._look()

    async def _rest(self, asked: asyncio.Task[None], answers: Sized) -> None:
        enough = len(answers) + KILL_ANSWERS
        enough_tokens = (await self._metrics())["lamina_gateway_tokens_total"] + KILL_TOKENS
        with suppress(TimeoutError):
            await until(lambda: asked.done() or len(answers) >= enough, KILL_SECONDS)
        while not asked.done() and (await self._metrics())["lamina_gateway_tokens_total"] < enough_tokens:
            await asyncio.sleep(0.1)

    async def _kill(self, stage: Revision) -> None:
        await until(lambda: bool(stage.ready_pods))
        self.running.append(await self._look())
        pod = self._dice.choice(stage.ready_pods)
        restarts = pod.restarts
        os.kill(pod.pid, signal.SIGKILL)
        await until(lambda: pod.restarts > restarts)
        assert "SIGKILL" in pod.last_end

    async def _look(self) -> float:
        samples = await self._metrics()
        self.replays.append(samples["lamina_gateway_replays_total"])
        return samples["lamina_gateway_running_sequences"]

    async def _metrics(self) -> dict[str, float]:
        return await pod_metrics(self.gateway.pods[0])
