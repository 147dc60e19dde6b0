"""While a first question waits: tells how the pods come up, and when one never will."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

_LOOK_SECONDS: Final = 0.1
_HOPELESS_RESTARTS: Final = 2
"""A function that ended twice before it was ever ready will do so again."""


class PodsFailed(Exception):
    """A pod cannot start. The message has its last words and where its log is."""


async def watch_starts(status: Callable[[], Mapping[str, Any]], tell: Callable[[str], None]) -> None:
    """Until cancelled. Raises PodsFailed."""
    seen: dict[str, str] = {}
    while True:
        for service, revision, pod in _pods(status()):
            _check(service, revision, pod)
            if pod["phase"] != seen.get(pod["name"], "") and pod["phase"] in ("starting", "ready", "back-off"):
                tell(f"{service}: {pod['phase']}" + (f" ({pod['trouble']})" if pod["phase"] == "back-off" else ""))
            seen[pod["name"]] = pod["phase"]
        await asyncio.sleep(_LOOK_SECONDS)


def _check(service: str, revision: Mapping[str, Any], pod: Mapping[str, Any]) -> None:
    if revision["failure"]:
        raise PodsFailed(f"{service}: {revision['failure']}; log: {pod['log']}")
    if pod["restarts"] >= _HOPELESS_RESTARTS and not pod["readiness"]:
        raise PodsFailed(f"{service} cannot start: {pod['trouble']}; log: {pod['log']}")


def _pods(status: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    for service in status["services"]:
        for revision in service["revisions"]:
            for pod in revision["pods"]:
                yield service["name"], revision, pod
