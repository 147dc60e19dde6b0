"""All clients of a soak in a process of their own, so that they take no time of the platform's event loop.

`python -m bench.soak.clients PLAN`, with a plan of `bench.soak.records` as JSON.
"""

import asyncio
import contextlib
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec

from bench.records import Recorder
from bench.soak.attacks import KINDS
from bench.soak.honest import AskingClient, session_of
from bench.soak.records import GREEDY, Attempt, Plan
from bench.soak.target import Kind, Target


async def run(plan: Plan, recorder: Recorder) -> None:
    """Returns when the plan is over and the last honest question is answered or lost."""
    async with session_of() as session, asyncio.TaskGroup() as clients:
        for number, client in enumerate([*plan.honest, *[GREEDY] * plan.greedy]):
            clients.create_task(AskingClient(session, plan, recorder, client, number).keep_asking())
        clients.create_task(attack(Target(plan, session), recorder))


async def attack(target: Target, recorder: Recorder) -> None:
    """All kinds of hostile clients attack until the plan is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(target.plan.seconds), asyncio.TaskGroup() as clients:
            for kind in KINDS:
                clients.create_task(_keep_attacking(kind, target, recorder))


async def _keep_attacking(kind: Kind, target: Target, recorder: Recorder) -> None:
    dice = random.Random(f"hostile {target.plan.seed} {kind.name}")
    while True:
        outcomes: Counter[str] = Counter()
        started = recorder.now
        try:
            await target.look()
            await kind.attack(target, dice, outcomes)
        except TimeoutError:
            outcomes["silent"] += 1
        except (OSError, KeyError, aiohttp.ClientError):
            outcomes["closed"] += 1
        except asyncio.CancelledError:
            if not outcomes:
                outcomes["unanswered at the end"] += 1
            raise
        finally:
            now = recorder.now
            recorder.write(Attempt(now, kind.name, round(now - started, 4), dict(outcomes)))
        await asyncio.sleep(dice.uniform(0.5, 1.5) * kind.pause_seconds)


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Recorder(Path(plan.records), plan.started) as recorder:
        asyncio.run(run(plan, recorder))


if __name__ == "__main__":
    main()
