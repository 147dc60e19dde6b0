"""Probes of a container, as Knative's webhook takes them, after its own defaults."""

from typing import Any, Final

from knative.webhook.feature_flags import MULTI_CONTAINER_PROBING, FeatureFlags
from knative.webhook.violation import Violation, Violations, disallowed, exactly_one_of, invalid, out_of_bounds

_HANDLERS: Final = ("httpGet", "tcpSocket", "exec", "grpc")
_KINDS: Final = ("livenessProbe", "readinessProbe", "startupProbe")
_NUMBERS: Final = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold")
_INT32: Final = 2**31 - 1


def probes(container: dict[str, Any], port_name: str | None, at: str, features: FeatureFlags) -> Violations:
    """port_name: of the port that is served; None for a sidecar, whose probes are behind a feature flag."""
    for kind in _KINDS:
        if kind not in container:
            continue
        probe = _with_defaults(container[kind], serving=port_name is not None) if kind == "readinessProbe" else container[kind]
        if port_name is None and not features.enabled(MULTI_CONTAINER_PROBING):
            yield from _of_sidecar(probe, f"{at}.{kind}")
            continue
        yield from _handler(probe, port_name, f"{at}.{kind}")
        if kind == "readinessProbe":
            yield from _readiness(probe, f"{at}.{kind}")


def _with_defaults(probe: dict[str, Any], *, serving: bool) -> dict[str, Any]:
    """A period of 0 means Knative's own aggressive probing; only with a period do Kubernetes' defaults apply."""
    filled = dict(probe)
    if serving and not any(name in probe for name in _HANDLERS):
        filled["tcpSocket"] = {}
    filled["successThreshold"] = probe.get("successThreshold") or 1
    if probe.get("periodSeconds"):
        filled["failureThreshold"] = probe.get("failureThreshold") or 3
        filled["timeoutSeconds"] = probe.get("timeoutSeconds") or 1
    return filled


def _of_sidecar(probe: dict[str, Any], at: str) -> Violations:
    if any(name in probe for name in _HANDLERS):
        yield disallowed(at, MULTI_CONTAINER_PROBING)
    for name in _NUMBERS:
        if probe.get(name):
            yield disallowed(f"{at}.{name}", MULTI_CONTAINER_PROBING)


def _handler(probe: dict[str, Any], port_name: str | None, at: str) -> Violations:
    yield from exactly_one_of(at, _HANDLERS, [name for name in _HANDLERS if name in probe])
    for name in ("httpGet", "tcpSocket"):
        port = probe.get(name, {}).get("port")
        if port_name is not None and isinstance(port, str) and port not in ("", port_name):
            yield invalid(f"{at}.{name}.port", port, "Probe port must match container port")


def _readiness(probe: dict[str, Any], at: str) -> Violations:
    for name in ("periodSeconds", "initialDelaySeconds"):
        if probe.get(name, 0) < 0:
            yield out_of_bounds(f"{at}.{name}", probe[name], 0, _INT32)
    if probe["successThreshold"] < 1:
        yield out_of_bounds(f"{at}.successThreshold", probe["successThreshold"], 1, _INT32)
    for name in ("failureThreshold", "timeoutSeconds"):
        number = probe.get(name, 0)
        if not probe.get("periodSeconds"):
            if number != 0:
                yield Violation(f"{at}.{name}", f"{name} is disallowed when periodSeconds is zero")
        elif number < 1:
            yield out_of_bounds(f"{at}.{name}", number, 1, _INT32)
