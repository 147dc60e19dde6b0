"""What `deploy` and `status` do for a fleet on a cluster."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from functions.configuration.config import FLEET_LABEL, PERCENT
from knative.render.fleet import door_files
from knative.spec.fleet_spec import FleetSpec
from knative.spec.kubernetes_object import KubernetesObject

if TYPE_CHECKING:
    from knative.cluster.client import Cluster
    from knative.cluster.deployer import Deployer

MOST_ROWS: Final = 20
FLEET_COLUMNS: Final = ("member", "model", "ready", "stages", "pods", "canary", "pipeline")


def deploy_fleet(
    deployer: "Deployer",
    fleet: FleetSpec,
    members: dict[str, dict[str, list[KubernetesObject]]],
    *,
    whole: bool,
    force: bool,
) -> str:
    """Deploys the gateway, then one member after the other, and returns the gateway's URL.

    whole: `members` are all of the fleet's, so that others are deleted; else only they are deployed. A member that is as the
    cluster has it is not touched. Raises ClusterError.
    """
    url = ""
    if whole:
        url = deployer.deploy([*chain(*door_files(fleet).values())], force=force)
    for files in members.values():
        url = deployer.deploy([*chain(*files.values())], force=force) or url
    if whole:
        for name in deployer.members_of(fleet.name):
            if name not in members:
                deployer.delete(name)
    return url


def fleet_status(cluster: "Cluster", namespace: str, name: str) -> dict[str, Any]:
    """Status of a fleet on a cluster as a JSON document: gateway and members, by three lists of the namespace's objects.

    A fleet with a gateway for events takes a list more for each kind of Eventing's objects.
    """
    from knative.cluster.objects import COMPONENT, INSTANCE, PIPELINE, SERVING, label, phase_of, readiness
    from knative.cluster.status import eventing_of, eventing_status

    selector = f"{FLEET_LABEL}={name}"
    services = cluster.find(SERVING, "Service", namespace, selector)
    pods = [pod for pod in cluster.find("v1", "Pod", namespace, selector) if phase_of(pod) != "over"]
    stages = [each for each in services if label(each, COMPONENT) == "stage"]
    members = []
    config_maps = cluster.find("v1", "ConfigMap", namespace, selector)
    for found in sorted(config_maps, key=lambda each: str(each["metadata"]["name"])):
        member, fingerprint = label(found, INSTANCE), label(found, PIPELINE)
        own = [each for each in stages if label(each, INSTANCE) == member and label(each, PIPELINE) == fingerprint]
        states = [readiness(each).ready for each in own]
        members.append(
            {
                "name": member,
                "model": found["data"].get("LAMINA_MODEL", ""),
                "ready": bool(states) and all(states),
                "stages": len(own),
                "pods": sum(label(pod, INSTANCE) == member and label(pod, PIPELINE) == fingerprint for pod in pods),
                "canary_percent": (found["metadata"].get("annotations") or {}).get(PERCENT, ""),
                "pipeline": fingerprint,
            }
        )
    gateways = {each["metadata"]["name"]: each for each in services if label(each, INSTANCE) == name}
    gateway = gateways.get(name)
    eventing = eventing_of(cluster, namespace, name) if len(gateways) > 1 else []
    return {
        "url": ((gateway or {}).get("status") or {}).get("url", ""),
        "gateway_ready": gateway is not None and readiness(gateway).ready is True,
        "gateway_pods": sum(label(pod, INSTANCE) == name for pod in pods),
        "eventing": [eventing_status(each) for each in eventing],
        "members": members,
    }


def one_screen(rows: Sequence[tuple[float, tuple[str, ...]]]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The MOST_ROWS rows with the greatest weights, in their order, and a line about the others if there are any."""
    kept = sorted(range(len(rows)), key=lambda number: -rows[number][0])[:MOST_ROWS]
    left = len(rows) - len(kept)
    return [rows[number][1] for number in sorted(kept)], [f"{left} more have pods or requests; --json has all"] if left else []


def fleet_rows(status: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows with FLEET_COLUMNS for members that have pods, a canary, or are not Ready. The others are at zero and well.

    If a screen cannot have all, first those that are not Ready, then those with most pods; the lines say how many are left.
    """
    rows = [
        (
            each["name"],
            each["model"],
            "yes" if each["ready"] else "no",
            str(each["stages"]),
            str(each["pods"]),
            f"{each['canary_percent']} %" if each["canary_percent"] else "",
            each["pipeline"],
        )
        for each in status["members"]
    ]
    weights = [math.inf if not each["ready"] else each["pods"] + bool(each["canary_percent"]) for each in status["members"]]
    return one_screen([(weight, row) for weight, row in zip(weights, rows, strict=True) if weight])


def fleet_lines(status: dict[str, Any]) -> Iterator[str]:
    """Lines below the table."""
    asleep = sum(1 for each in status["members"] if each["ready"] and not each["pods"])
    gateway = "ready" if status["gateway_ready"] else "NOT ready"
    yield f"{len(status['members'])} members, {asleep} of them at zero"
    yield f"gateway {gateway} with {status['gateway_pods']} pods: {status['url']}"
    for each in status["eventing"]:
        if each["ready"] != "ready":
            yield f"{each['kind']} {each['name']}: {each['ready']}{each['reason']}"
