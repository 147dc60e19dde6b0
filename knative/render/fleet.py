"""Objects of a fleet: one gateway, what it may do, and for each member its stages and the ConfigMap that names them."""

from typing import Final

from functions.configuration.config import member_keys
from knative.render.access import around_gateway
from knative.render.eventing import eventing_objects
from knative.render.monitoring import monitoring_objects
from knative.render.resolved_pipeline import ResolvedPipeline, cluster_url, pipeline_object
from knative.render.services import KEYS_FOLDER, gateway_environment, gateway_service, stage_service
from knative.spec.fleet_spec import FleetSpec
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import quantity

GRANTS: Final = "{}-grants"
_MEMORY_SHARE: Final = 0.75  # of the gateway's memory, beyond which it gives up idle members


def fleet_door(fleet: FleetSpec) -> ResolvedPipeline:
    """The fleet's gateway as the gateway of a pipeline without stages."""
    return ResolvedPipeline(fleet.door(), ((0, 1),), "none", fleet=fleet.name)


def door_files(fleet: FleetSpec) -> dict[str, list[KubernetesObject]]:
    """File name → objects of the gateway, in the order in which they are applied."""
    lease = fleet_lease(fleet)
    files = around_gateway(fleet_door(fleet), lease[0]["metadata"]["name"] if lease else None)
    if lease:
        files["grants.yaml"] = lease
    if fleet.monitoring is not None:
        files["monitoring.yaml"] = monitoring_objects(fleet_door(fleet))
    files["gateway.yaml"] = [fleet_gateway(fleet)]
    if fleet.eventing is not None:
        files["gateway-events.yaml"] = [fleet_gateway(fleet, for_events=True)]
        files["eventing.yaml"] = eventing_objects(fleet_door(fleet))
    return files


def fleet_lease(fleet: FleetSpec) -> list[KubernetesObject]:
    """The Lease in which the fleet's gateways keep which members have devices. Empty without `max_devices`."""
    if fleet.max_devices is None:
        return []
    return [pipeline_object(fleet_door(fleet), "coordination.k8s.io/v1", "Lease", GRANTS.format(fleet.name), "gateway")]


def member_files(member: ResolvedPipeline) -> dict[str, list[KubernetesObject]]:
    """File name → objects of a member: its stages, then the ConfigMap from which the fleet's gateways learn of them."""
    name = member.spec.name
    files = {f"{name}-stage-{index}.yaml": [stage_service(member, index)] for index in range(len(member.cut))}
    return {**files, f"{name}.yaml": [member_config_map(member)]}


def member_config_map(member: ResolvedPipeline) -> KubernetesObject:
    """The environment of the member's part in a gateway."""
    own = member_keys()
    data = {entry["name"]: entry["value"] for entry in gateway_environment(member) if entry["name"] in own}
    return pipeline_object(member, "v1", "ConfigMap", member.spec.name, "gateway", data=data)


def fleet_gateway(fleet: FleetSpec, *, for_events: bool = False) -> KubernetesObject:
    """The Service of the fleet's gateway or, with for_events, of the one to which Eventing delivers, which asks for no keys."""
    service = gateway_service(fleet_door(fleet), for_events=for_events)
    template = service["spec"]["template"]
    container = template["spec"]["containers"][0]
    of_members = member_keys()
    more = {
        "LAMINA_ROLE": "fleet",
        "LAMINA_FLEET": fleet.name,
        "LAMINA_FLEET_MEMORY_BYTES": str(int(_MEMORY_SHARE * quantity(fleet.gateway.resources.memory))),
        "LAMINA_OWN_URL": cluster_url(service["metadata"]["name"], fleet.namespace),
    }
    if fleet.max_devices is not None:
        more |= {"LAMINA_FLEET_MAX_DEVICES": str(fleet.max_devices), "LAMINA_FLEET_LEASE": GRANTS.format(fleet.name)}
    # Mounted whole, so that a new member's entry needs no new pod.
    for secret in () if for_events else fleet.gateway.api_keys_secrets:
        more["LAMINA_FLEET_KEYS"] = f"{KEYS_FOLDER}/{secret}"
        for volume in template["spec"]["volumes"]:
            if volume.get("secret", {}).get("secretName") == secret:
                del volume["secret"]["items"]
    rest = [entry for entry in container["env"] if entry["name"] not in {*of_members, *more}]
    container["env"] = [*({"name": name, "value": value} for name, value in more.items()), *rest]
    return service
