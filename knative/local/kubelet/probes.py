"""The probes of a container, run against 127.0.0.1 as the kubelet and queue-proxy run them against a pod."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knative.local.errors import UnsupportedManifest


@dataclass(frozen=True, slots=True)
class Probe:
    """HTTP GET of `path`, or with None a mere connection."""

    path: str | None
    period_seconds: float = 10
    timeout_seconds: float = 1
    failure_threshold: int = 3
    initial_delay_seconds: float = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    passed: bool
    text: str
    """What was seen: the body, or what went wrong."""


def read_probe(container: Mapping[str, Any], name: str) -> Probe | None:
    """`readinessProbe` or `livenessProbe` of a container. Raises UnsupportedManifest for kinds other than HTTP and TCP."""
    probe = container.get(name)
    if not probe:
        return None
    known = {"httpGet", "tcpSocket", *_NUMBERS, "successThreshold"}
    if unknown := set(probe) - known:
        raise UnsupportedManifest(f"{name}.{min(unknown)}: only httpGet and tcpSocket are run on one machine")
    path = (probe["httpGet"].get("path") or "/") if "httpGet" in probe else None
    numbers = {field: probe[key] for key, field in _NUMBERS.items() if probe.get(key)}
    return Probe(path=path, **numbers)


async def run_probe(probe: Probe, port: int) -> ProbeResult:
    try:
        async with asyncio.timeout(probe.timeout_seconds):
            return await _run(probe.path, port)
    except TimeoutError:
        return ProbeResult(False, f"no answer in {probe.timeout_seconds:g} seconds")
    except OSError as error:
        return ProbeResult(False, error.strerror or str(error))


_NUMBERS = {
    "periodSeconds": "period_seconds",
    "timeoutSeconds": "timeout_seconds",
    "failureThreshold": "failure_threshold",
    "initialDelaySeconds": "initial_delay_seconds",
}


async def _run(path: str | None, port: int) -> ProbeResult:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if path is None:
            return ProbeResult(True, "")
        # HTTP/1.0: the server closes, so the answer ends where the stream does.
        writer.write(b"GET %b HTTP/1.0\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe/lamina\r\n\r\n" % path.encode())
        answer = await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not status or not status[0].isdigit():
        return ProbeResult(False, "no HTTP answer")
    code = int(status[0])
    return ProbeResult(200 <= code < 400, body.decode(errors="replace") if body else f"status {code}")
