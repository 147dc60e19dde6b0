"""The probes of a container, run against 127.0.0.1 as the kubelet and queue-proxy run them against a pod.

A readiness probe whose `periodSeconds` is 0 or unset is run every 50 ms until it passes, as by queue-proxy (knative/serving,
pkg/queue/readiness/probe.go). With a period it is run once per period, as by the kubelet. A container without a probe is
probed by a connection to its port every 50 ms.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from knative.local.errors import UnsupportedManifest

_AGGRESSIVE_SECONDS: Final = 0.05
_AGGRESSIVE_TIMEOUT_SECONDS: Final = 0.1
_NUMBERS: Final = {
    "periodSeconds": "period_seconds",
    "timeoutSeconds": "timeout_seconds",
    "failureThreshold": "failure_threshold",
    "successThreshold": "success_threshold",
    "initialDelaySeconds": "initial_delay_seconds",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness or liveness probe. The defaults are those of Kubernetes."""

    path: str | None  # of an HTTP GET; None: only a connection
    period_seconds: float = 10
    timeout_seconds: float = 1
    failure_threshold: int = 3
    success_threshold: int = 1
    initial_delay_seconds: float = 0
    aggressive: bool = False  # every 50 ms until it passes, then every `period_seconds`

    @property
    def until_ready(self) -> "Probe":
        """The probe as it is run until the container is ready for the first time."""
        if not self.aggressive:
            return self
        return replace(self, period_seconds=_AGGRESSIVE_SECONDS, timeout_seconds=_AGGRESSIVE_TIMEOUT_SECONDS)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    passed: bool
    text: str  # the body, or what went wrong


def readiness_probe(container: Mapping[str, Any]) -> Probe:
    """The readiness probe of a container. Without one it is ready when its port takes a connection.

    Raises UnsupportedManifest.
    """
    probe = read_probe(container, "readinessProbe") or Probe(path=None)
    return replace(probe, aggressive=not (container.get("readinessProbe") or {}).get("periodSeconds"))


def read_probe(container: Mapping[str, Any], name: str) -> Probe | None:
    """The probe in the field `name`, such as livenessProbe; None if the container has none. Raises UnsupportedManifest.

    A process has one port here and speaks HTTP on it. `host` is ignored, as in Knative.
    """
    probe = container.get(name)
    if not probe:
        return None
    if unknown := set(probe) - {"httpGet", "tcpSocket", *_NUMBERS}:
        raise UnsupportedManifest(f"{name}.{min(unknown)}: only httpGet and tcpSocket are run on one machine")
    own_port = [port.get(key) for port in container.get("ports") or () for key in ("containerPort", "name")]
    for kind in ("httpGet", "tcpSocket"):
        action = probe.get(kind) or {}
        if (port := action.get("port")) and port not in own_port:
            raise UnsupportedManifest(f"{name}.{kind}.port: {port} is not the container's own port, the only one here")
        if action.get("httpHeaders"):
            raise UnsupportedManifest(f"{name}.{kind}.httpHeaders: probes send no headers on one machine")
        if action.get("scheme", "HTTP") != "HTTP":
            raise UnsupportedManifest(f"{name}.{kind}.scheme: only HTTP on one machine")
    path = (probe["httpGet"].get("path") or "/") if "httpGet" in probe else None
    return Probe(path=path, **{field: probe[key] for key, field in _NUMBERS.items() if probe.get(key)})


async def run_probe(probe: Probe, port: int) -> ProbeResult:
    answer = b""
    try:
        async with asyncio.timeout(probe.timeout_seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if probe.path is not None:
                    # HTTP/1.0: the server closes the connection after the answer.
                    request = b"GET %b HTTP/1.0\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe/lamina\r\n\r\n"
                    writer.write(request % probe.path.encode())
                    answer = await reader.read()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        return ProbeResult(False, f"no answer in {probe.timeout_seconds:g} seconds")
    except OSError as error:
        return ProbeResult(False, error.strerror or str(error))
    if probe.path is None:
        return ProbeResult(True, "")
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not status or not status[0].isdigit():
        return ProbeResult(False, "no HTTP answer")
    code = int(status[0])
    return ProbeResult(200 <= code < 400, body.decode(errors="replace") if body else f"status {code}")
