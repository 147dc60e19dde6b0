"""Resources that a pipeline used: replica-seconds of each revision, times the memory, cores and GPUs that its pods request.

The past is known only to a Prometheus that scrapes Knative's autoscaler, whose gauge `kn_revision_pods_count` is the number of
pods of a revision. Without one, running pods are counted, each since its start.
"""

import json
import urllib.parse
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any, Final

from knative.cluster.client import Cluster
from knative.cluster.errors import ClusterError
from knative.cluster.objects import INSTANCE, REVISION_LABEL, SERVICE_LABEL, SERVING, label, own_selector, phase_of, services_of
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import quantity

_GAUGE: Final = "kn_revision_pods_count"
_STEP_SECONDS: Final = 15
_MOST_POINTS: Final = 10_000  # points of a series in one reply; Prometheus allows 11,000
_COUNTED: Final = ("cpu", "memory", "nvidia.com/gpu")


class NotCounted(ClusterError):
    """Prometheus does not answer, or has no values of the gauge for the pipeline. The message says what is needed."""


@dataclass(frozen=True, slots=True)
class RevisionUsage:
    service: str
    revision: str
    replica_seconds: float
    requests: dict[str, float] | None  # by one pod: memory (bytes), cpu (cores), nvidia.com/gpu; None: revision deleted

    def seconds_of(self, resource: str) -> float | None:
        """Amount of a resource that one pod requests, times replica_seconds. None if the requests are unknown."""
        return None if self.requests is None else self.replica_seconds * self.requests.get(resource, 0.0)


def usage_since_start(cluster: Cluster, namespace: str, name: str, now: datetime | None = None) -> list[RevisionUsage]:
    """Usage of the pods that run now, each counted from its start until `now`, by default the current time.

    Pods that have ended are not counted.
    """
    moment = now or datetime.now(UTC)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    requests: dict[tuple[str, str], dict[str, float]] = {}
    for pod in cluster.find("v1", "Pod", namespace, own_selector(name)):
        started = (pod.get("status") or {}).get("startTime")
        if started is None or phase_of(pod) == "over":
            continue
        key = (label(pod, SERVICE_LABEL), label(pod, REVISION_LABEL))
        seconds[key] += (moment - datetime.fromisoformat(started)).total_seconds()
        requests[key] = _requests(pod["spec"]["containers"])
    return [RevisionUsage(*key, seconds[key], requests[key]) for key in sorted(seconds)]


def usage_from_prometheus(
    cluster: Cluster, namespace: str, name: str, url: str, window_seconds: float, now: float
) -> list[RevisionUsage]:
    """Usage in the last window_seconds before the Unix time `now`, counted by the Prometheus at `url`. Raises NotCounted."""
    pattern = f"{name}(-[0-9a-f]{{8}}-(s[0-9]+|ev))?"
    query = f'{_GAUGE}{{k8s_namespace_name="{namespace}",kn_service_name=~"{pattern}"}}'
    step = max(_STEP_SECONDS, window_seconds / _MOST_POINTS)
    series = _query_range(url, query, now - window_seconds, now, step)
    if not series:
        raise NotCounted(
            f"the Prometheus at {url} has no {_GAUGE} of {name} in namespace {namespace} for that time; Knative's autoscaler "
            "exports it if config-observability has `metrics-protocol: prometheus`, and it must be scraped; without "
            "--prometheus the pods that run now are counted"
        )
    services = {service["metadata"]["name"] for service in services_of(cluster, namespace, name)}
    requests = {
        each["metadata"]["name"]: _requests(each["spec"]["containers"])
        for each in cluster.find(SERVING, "Revision", namespace, f"{INSTANCE}={name}")
        if label(each, SERVICE_LABEL) in services
    }
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for each in series:
        key = (each["metric"].get("kn_service_name", ""), each["metric"].get("kn_revision_name", ""))
        found[key] += sum(float(count) for _, count in each["values"]) * step  # a step without a value counts as 0
    return [RevisionUsage(*key, found[key], requests.get(key[1])) for key in sorted(found)]


def _query_range(url: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    arguments = urllib.parse.urlencode({"query": query, "start": start + step, "end": end, "step": step})
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/query_range?{arguments}", timeout=30) as reply:
            result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise NotCounted(
            f"{url} does not answer as a Prometheus does: {error}; check the address, port-forward and path"
        ) from error
    return result


def _requests(containers: list[KubernetesObject]) -> dict[str, float]:
    """Requested cpu, memory and GPUs, summed over the containers of a pod, queue-proxy included."""
    total: defaultdict[str, float] = defaultdict(float)
    for container in containers:
        for resource, amount in ((container.get("resources") or {}).get("requests") or {}).items():
            if resource in _COUNTED:
                total[resource] += quantity(str(amount))
    return dict(total)
