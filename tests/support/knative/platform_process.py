"""A platform in a process of its own, for tests that kill it: `python -m tests.support.knative.platform_process FOLDER`.

Starts three pods of the echo app, one of them with a child, prints the pids, and serves until it is ended.
"""

import asyncio
import signal
import sys
from pathlib import Path

from tests.support.knative.platform import echo_service, revision, running_platform, until

PODS = 3


async def serve(folder: Path) -> None:
    manifest = echo_service(annotations={"min-scale": str(PODS), "initial-scale": str(PODS)})
    async with running_platform(folder, manifest) as platform:
        await until(lambda: len(revision(platform).ready_pods) == PODS)
        print(*(pod.pid for pod in revision(platform).pods), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background commands with SIGINT ignored
    asyncio.run(serve(Path(sys.argv[1])))
