"""Decisions of activator and queue-proxy, without processes: balancing, slots, counting."""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import cast

import pytest

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange
from knative.local.proxies.activator import Activator
from knative.local.proxies.concurrency import ConcurrencyMeter
from knative.local.proxies.queue_proxy import Breaker, QueueProxy
from knative.local.proxies.timeouts import Timeouts
from tests.support.knative.platform import until

ASKED = SimpleNamespace(
    started=False, written_at=None, headers=[], peers=[]
)  # the part of an Exchange that the activator reads


class HeldProxy:
    """Stands for a pod's queue-proxy: holds every request until the gate opens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.served = 0
        self.gate = asyncio.Event()

    async def serve(self, exchange: object) -> None:
        self.served += 1
        await self.gate.wait()


class Scene:
    """An activator and its pods, which hold every request until `let_go`."""

    def __init__(self, concurrency: int, pods: int, wake: Callable[[], None] = lambda: None) -> None:
        self.held = [HeldProxy(str(index)) for index in range(pods)]
        self.pods = cast("list[QueueProxy]", self.held)
        self.activator = Activator(concurrency, Timeouts(30), 100, wake)
        self.activator.set_pods(self.pods)

    def send(self, count: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.activator.serve(cast(Exchange, ASKED))) for _ in range(count)]

    def served(self) -> list[int]:
        return [proxy.served for proxy in self.held]

    async def let_go(self, tasks: list[asyncio.Task[None]]) -> None:
        for proxy in self.held:
            proxy.gate.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("concurrency", "requests", "served"),
    [
        pytest.param(2, 5, [2, 2, 1], id="up to three the first pod with a free slot"),
        pytest.param(10, 9, [3, 3, 3], id="above three in turn"),
        pytest.param(0, 40, [20, 20], id="without a limit the less busy of two"),
    ],
)
async def test_balancing(concurrency: int, requests: int, served: list[int]) -> None:
    scene = Scene(concurrency, len(served))
    tasks = scene.send(requests)
    await until(lambda: sum(scene.served()) == requests)
    assert scene.served() == served
    await scene.let_go(tasks)


async def test_full_pods_keep_requests_waiting_and_a_new_pod_gets_them() -> None:
    scene = Scene(1, 2)
    scene.activator.set_pods(scene.pods[:1])
    tasks = scene.send(3)
    await until(lambda: len(scene.activator.waiting) == 2)
    scene.activator.set_pods(scene.pods)
    await until(lambda: scene.held[1].served == 1)
    assert len(scene.activator.waiting) == 1
    await scene.let_go(tasks)
    assert scene.activator.meter.in_flight == 0


async def test_an_activator_out_of_the_path_holds_and_counts_nothing() -> None:
    scene = Scene(1, 2)
    scene.activator.in_path = False
    tasks = scene.send(6)
    await until(lambda: sum(scene.served()) == 6)
    assert (scene.activator.meter.in_flight, len(scene.activator.waiting)) == (0, 0)
    await scene.let_go(tasks)


async def test_a_cancelled_wait_returns_its_slot() -> None:
    scene = Scene(1, 1)
    running, *waiting = scene.send(3)
    await until(lambda: len(scene.activator.waiting) == 2)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    await scene.let_go([running, waiting[1]])
    await scene.let_go(scene.send(2))


async def test_every_request_at_zero_wakes_the_revision_and_learns_why_it_failed() -> None:
    woken: list[None] = []
    scene = Scene(1, 0, wake=lambda: woken.append(None))
    tasks = scene.send(2)
    await until(lambda: len(scene.activator.waiting) == 2)
    assert len(woken) == 2
    scene.activator.fail_waiting("no luck")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["no luck", "no luck"]


async def test_the_breaker_keeps_order_and_refuses_beyond_ten_times() -> None:
    breaker, order, gates = Breaker(1), [], [asyncio.Event() for _ in range(11)]

    async def visit(index: int) -> None:
        async with breaker.slot():
            order.append(index)
            await gates[index].wait()

    tasks = [asyncio.create_task(visit(index)) for index in range(11)]
    await until(lambda: order == [0])
    with pytest.raises(HttpError, match="pending request queue full"):
        await visit(0)
    tasks[3].cancel()
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 2, *range(4, 11)]
    async with breaker.slot():
        pass


async def test_a_breaker_without_limit_admits_everything() -> None:
    breaker = Breaker(0)
    async with AsyncExitStack() as stack:
        for _ in range(50):
            await stack.enter_async_context(breaker.slot())


def test_concurrency_is_weighted_by_time() -> None:
    meter = ConcurrencyMeter(10.0)
    meter.enter(10.0)
    meter.enter(10.5)
    meter.leave(10.75)
    report = meter.report(11.0)
    assert report.average == pytest.approx(1.25)
    assert report.arrivals == 2
    assert meter.report(12.0).average == pytest.approx(1.0)
    assert Counter([meter.report(12.0).arrivals]) == {0: 1}
