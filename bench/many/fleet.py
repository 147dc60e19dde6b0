"""What a fleet of pipelines at zero costs: the gateway's memory and CPU, and objects in the cluster."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import psutil

from bench.report import Verdict, judged, table
from functions.gateway.stages.kubernetes_api import WATCH_SECONDS
from knative.local.platform import PlatformOptions, running_platform
from knative.render.fleet import door_files, member_files
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.cut import parse_cut
from knative.spec.fleet_spec import FleetSpec
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.spec_file import spec_from_dict

_MOST_MIB: Final = 400.0
_MOST_CORE: Final = 0.02
_SETTLE_SECONDS: Final = 10.0
_LAYERS: Final = 30
_WATCHES: Final = 2  # ConfigMaps and EndpointSlices
_MADE_FOR_A_SERVICE: Final = 17
"""Objects that a cluster makes for a Knative Service with one revision (Knative Serving of August 2026, pkg/reconciler).

Knative: Configuration, Route, Revision, Deployment, Image, PodAutoscaler, Metric, ServerlessService, Ingress, three Services,
and the public one's Endpoints. Kubernetes: ReplicaSet, the private Service's Endpoints, and their two EndpointSlices.
"""


@dataclass(frozen=True, slots=True)
class AtZero:
    """The findings for a fleet at zero."""

    members: int
    stages: int  # of each member
    resident_mib: float
    core_share: float  # CPU seconds of the gateway in a second
    objects: Counter[str]  # that are applied, by kind

    @property
    def applied(self) -> int:
        return self.objects.total()

    @property
    def on_a_cluster(self) -> int:
        services = self.objects["Service"]  # all of them Knative's
        return self.applied + _MADE_FOR_A_SERVICE * services


def fleet_objects(members: int, stages: int) -> list[KubernetesObject]:
    """The objects of a fleet whose members' publications need not exist, because nobody asks them."""
    store = {"endpoint": "http://127.0.0.1:9", "secret": "store"}
    fleet = msgspec.convert(
        {"kind": "Fleet", "name": "models", "image": "lamina:local", "store": store, "members": []}, FleetSpec
    )
    autoscaling = msgspec.structs.replace(fleet.gateway.autoscaling, min_scale=1, initial_scale=1)
    fleet = msgspec.structs.replace(fleet, gateway=msgspec.structs.replace(fleet.gateway, autoscaling=autoscaling))
    cut = ",".join(f"{_LAYERS * k // stages}:{_LAYERS * (k + 1) // stages}" for k in range(stages))
    found: list[KubernetesObject] = []
    for number in range(members):
        own = {"name": f"member-{number}", "model": {"name": f"model-{number}"}, "cut": cut}
        shared = {"image": fleet.image, "store": store, "pipeline_token_secret": fleet.token_secret}
        spec = spec_from_dict(own | shared)
        pipeline = ResolvedPipeline(spec, parse_cut(cut), f"{number:064x}", fleet=fleet.name)
        found += [each for objects in member_files(pipeline).values() for each in objects]
    # Last, because knative/local starts new Services warm while others have pods.
    return [*found, *(each for objects in door_files(fleet).values() for each in objects)]


async def measure(members: int, stages: int, seconds: float) -> AtZero:
    """Runs the fleet's gateway on knative/local's API for `seconds`, while all its members are at zero."""
    objects = fleet_objects(members, stages)
    with tempfile.TemporaryDirectory() as folder:
        secrets = {"store": {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}, "models-pipeline": {"token": "t"}}
        async with running_platform(PlatformOptions(secrets=secrets, logs=Path(folder)), objects) as platform:
            (revision,) = platform.services["default", "models"].revisions
            async with asyncio.timeout(60):
                while not revision.ready_pods:
                    await asyncio.sleep(0.2)
            process = psutil.Process(revision.ready_pods[0].pid)
            await asyncio.sleep(_SETTLE_SECONDS)
            before = sum(process.cpu_times()[:2])
            await asyncio.sleep(seconds)
            used = sum(process.cpu_times()[:2]) - before
            resident = process.memory_info().rss / 2**20
    return AtZero(members, stages, resident, used / seconds, Counter(each["kind"] for each in objects))


def verdicts(found: Sequence[AtZero]) -> list[Verdict]:
    most = max(found, key=lambda each: each.members)
    return [
        judged(f"{most.members} members at zero: MiB of the gateway", most.resident_mib, _MOST_MIB, at_most=True),
        judged(f"{most.members} members at zero: share of a core", most.core_share, _MOST_CORE, at_most=True),
    ]


def markdown(found: Sequence[AtZero], facts: str) -> str:
    columns = ["members", "stages of each", "gateway memory", "CPU of a core", "objects applied"]
    columns += ["objects on a cluster", "requests to the API a minute"]
    rows = [
        [
            each.members,
            each.stages,
            f"{each.resident_mib:.0f} MiB",
            f"{each.core_share:.2%}",
            f"{each.applied} ({', '.join(f'{count} {kind}' for kind, count in each.objects.most_common(2))})",
            f"{each.on_a_cluster:,}",
            f"{_WATCHES * 60 / WATCH_SECONDS:.0f}",
        ]
        for each in found
    ]
    told = [f"* {verdict}." for verdict in verdicts(found)]
    return "\n".join(["## A fleet at zero", "", facts, "", table(columns, rows), "", *told])
