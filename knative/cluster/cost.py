"""What a pipeline used: replica-seconds of each revision, and with what its pods request also byte-, core- and GPU-seconds.

Over a time that is past only somebody who counted knows: a Prometheus that scrapes Knative's autoscaler, whose gauge
`kn_revision_pods_count` is the number of pods of a revision. Without one there is what runs now, since each pod's start.
"""

import json
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from knative.cluster.client import Cluster
from knative.cluster.errors import ClusterError
from knative.cluster.history import INSTANCE, MANAGED_BY
from knative.cluster.readiness import REVISION_LABEL, SERVICE_LABEL, SERVING
from knative.cluster.status import phase_of, services_of
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import quantity

_GAUGE: Final = "kn_revision_pods_count"
_STEP_SECONDS: Final = 15
_MOST_POINTS: Final = 10_000
"""Of a series, in one answer: Prometheus gives 11,000."""
_GPU: Final = "nvidia.com/gpu"


class NotCounted(ClusterError):
    """The Prometheus does not answer, or does not scrape what counts pods. The message says what is needed."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one revision. bytes, cores and gpus: what each of its pods requests; None where the revision is gone."""

    service: str
    revision: str
    replica_seconds: float
    requests: dict[str, float] | None

    def seconds_of(self, resource: str) -> float | None:
        """replica_seconds times what a pod requests of `memory` (bytes), `cpu` (cores) or `nvidia.com/gpu`."""
        return None if self.requests is None else self.replica_seconds * self.requests.get(resource, 0.0)


def usage_since_start(cluster: Cluster, namespace: str, name: str, now: datetime | None = None) -> list[Usage]:
    """Of the pods that run now, each since its start; what ended before is not in it."""
    moment = now or datetime.now(UTC)
    seconds: dict[tuple[str, str], float] = {}
    requests: dict[tuple[str, str], dict[str, float]] = {}
    for pod in cluster.find("v1", "Pod", namespace, f"{INSTANCE}={name},{MANAGED_BY}=lamina"):
        started = (pod.get("status") or {}).get("startTime")
        if started is None or phase_of(pod) == "over":
            continue
        key = (pod["metadata"]["labels"].get(SERVICE_LABEL, ""), pod["metadata"]["labels"].get(REVISION_LABEL, ""))
        seconds[key] = seconds.get(key, 0.0) + (moment - datetime.fromisoformat(started)).total_seconds()
        requests[key] = _requests(pod["spec"]["containers"])
    return [Usage(*key, seconds[key], requests[key]) for key in sorted(seconds)]


def usage_from_prometheus(
    cluster: Cluster, namespace: str, name: str, url: str, window_seconds: float, now: float
) -> list[Usage]:
    """Over the last window_seconds before the Unix time `now`. Raises NotCounted."""
    pattern = f"{name}(-[0-9a-f]{{8}}-(s[0-9]+|ev))?"
    query = f'{_GAUGE}{{k8s_namespace_name="{namespace}",kn_service_name=~"{pattern}"}}'
    step = max(_STEP_SECONDS, window_seconds / _MOST_POINTS)
    series = _query_range(url, query, now - window_seconds, now, step)
    if not series:
        raise NotCounted(
            f"the Prometheus at {url} has no {_GAUGE} of {name} in namespace {namespace} for that time; Knative's autoscaler "
            "gives it once config-observability says `metrics-protocol: prometheus` and it is scraped; without --prometheus "
            "the pods that run now are counted"
        )
    requests = _requests_of_revisions(cluster, namespace, name)
    found: dict[tuple[str, str], float] = {}
    for each in series:
        key = (each["metric"].get("kn_service_name", ""), each["metric"].get("kn_revision_name", ""))
        found[key] = found.get(key, 0.0) + replica_seconds(each["values"], step)
    return [Usage(*key, found[key], requests.get(key[1])) for key in sorted(found)]


def replica_seconds(values: Iterable[tuple[float, str]], step_seconds: float) -> float:
    """values: Unix time and number of pods, a step apart; a step without a value counts for nothing."""
    return sum(float(count) for _, count in values) * step_seconds


def _query_range(url: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    asked = urllib.parse.urlencode({"query": query, "start": start + step, "end": end, "step": step})
    place = f"{url.rstrip('/')}/api/v1/query_range?{asked}"
    try:
        with urllib.request.urlopen(place, timeout=30) as reply:
            answer = json.load(reply)
        result: list[dict[str, Any]] = answer["data"]["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotCounted(
            f"{url} does not answer as a Prometheus does: {error}; check the address, port-forward and path"
        ) from error
    return result


def _requests_of_revisions(cluster: Cluster, namespace: str, name: str) -> dict[str, dict[str, float]]:
    names = {service["metadata"]["name"] for service in services_of(cluster, namespace, name)}
    return {
        each["metadata"]["name"]: _requests(each["spec"]["containers"])
        for each in cluster.find(SERVING, "Revision", namespace, f"{INSTANCE}={name}")
        if each["metadata"]["labels"].get(SERVICE_LABEL) in names
    }


def _requests(containers: list[KubernetesObject]) -> dict[str, float]:
    """Summed over the containers, queue-proxy among them where it says any."""
    total: dict[str, float] = {}
    for container in containers:
        for resource, amount in ((container.get("resources") or {}).get("requests") or {}).items():
            if resource in ("cpu", "memory", _GPU):
                total[resource] = total.get(resource, 0.0) + quantity(str(amount))
    return total
