"""All clients of a soak in a process of their own, so that they take no time of the platform's event loop.

`python -m bench.soak.clients PLAN`, with a plan of `bench.soak.records` as JSON.
"""

import asyncio
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec

from bench.records import Recorder
from bench.soak.attacks import KINDS
from bench.soak.honest import HonestClient, session_of
from bench.soak.records import Attempt, Lull, Plan
from bench.soak.target import Kind, Target


async def run(plan: Plan, recorder: Recorder) -> None:
    """Returns when the plan is over and the last honest question is answered or lost."""
    async with session_of(plan) as session, asyncio.TaskGroup() as clients:
        for number in range(plan.honest):
            clients.create_task(HonestClient(session, plan, recorder).keep_asking(number))
        clients.create_task(HostileClients(Target(plan, session), plan, recorder).run())


class HostileClients:
    """All kinds attack in rounds; each round ends with a lull without them."""

    def __init__(self, target: Target, plan: Plan, recorder: Recorder) -> None:
        self._target = target
        self._plan = plan
        self._recorder = recorder

    async def run(self) -> None:
        """Attacks until the plan is over."""
        over = self._recorder.now + self._plan.seconds
        dice = {kind.name: random.Random(f"hostile {self._plan.seed} {kind.name}") for kind in KINDS}
        while (now := self._recorder.now) + self._plan.round_seconds <= over + 1:
            await self._attack(dice, self._plan.round_seconds - self._plan.lull_seconds)
            lull = now + self._plan.round_seconds
            self._recorder.write(Lull(self._recorder.now, lull))
            await asyncio.sleep(max(0.0, lull - self._recorder.now))

    async def _attack(self, dice: dict[str, random.Random], seconds: float) -> None:
        clients = [asyncio.create_task(self._keep_attacking(kind, dice[kind.name])) for kind in KINDS]
        try:
            await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for client in clients:
                client.cancel()
            results = await asyncio.gather(*clients, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                raise error

    async def _keep_attacking(self, kind: Kind, dice: random.Random) -> None:
        while True:
            outcomes: Counter[str] = Counter()
            started = self._recorder.now
            try:
                await self._target.look()
                await kind.attack(self._target, dice, outcomes)
            except TimeoutError:
                outcomes["silent"] += 1
            except (OSError, KeyError, aiohttp.ClientError):
                outcomes["closed"] += 1
            except asyncio.CancelledError:
                if not outcomes:
                    outcomes["unanswered until the lull"] += 1
                raise
            finally:
                now = self._recorder.now
                self._recorder.write(Attempt(now, kind.name, round(now - started, 4), dict(outcomes)))
            await asyncio.sleep(dice.uniform(0.5, 1.5) * kind.pause_seconds)


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Recorder(Path(plan.records), plan.started) as recorder:
        asyncio.run(run(plan, recorder))


if __name__ == "__main__":
    main()
