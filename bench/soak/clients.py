"""All clients of a soak in a process of their own, so that they take nothing from the platform's event loop.

`python -m bench.soak.clients PLAN`, with a plan of `bench.soak.records` as JSON.
"""

import asyncio
import resource
import sys
from pathlib import Path

import msgspec

from bench.soak.honest import HonestClient, session_of
from bench.soak.hostile import HostileClients
from bench.soak.records import Plan, Recorder
from bench.soak.target import Target


async def run(plan: Plan, recorder: Recorder) -> None:
    """Returns when the plan is over and the last honest question is answered or lost."""
    async with session_of(plan) as session, asyncio.TaskGroup() as clients:
        for number in range(plan.honest):
            clients.create_task(HonestClient(session, plan, recorder).keep_asking(number))
        clients.create_task(HostileClients(Target(plan, session), plan, recorder).run())


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Recorder(Path(plan.records), plan.started) as recorder:
        asyncio.run(run(plan, recorder))


if __name__ == "__main__":
    main()
