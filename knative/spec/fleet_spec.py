"""FleetSpec: many pipelines behind one gateway, as a user describes them in YAML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from knative.spec.cut import parse_cut
from knative.spec.errors import SpecError, describe_fault
from knative.spec.pipeline_spec import (
    Autoscaling,
    EventingSpec,
    GatewaySpec,
    KVStoreSpec,
    ModelSpec,
    MonitoringSpec,
    NetworkSpec,
    PipelineSpec,
    Positive,
    StoreSpec,
    Tracing,
)
from knative.spec.spec_file import read_yaml, spec_from_dict
from knative.spec.stage_overrides import changed

KIND: Final = "Fleet"
# Fields that all members have in common. A member that names one must say the same.
_SHARED: Final = ("namespace", "image", "store", "network", "tracing", "log_level", "pipeline_token_secret")
# Fields of `gateway` that concern the process. The others concern a pipeline and belong to members.
_OF_PROCESS: Final = frozenset(
    (
        "resources", "timeout_seconds", "api_keys_secret", "limits_secret", "cors_origins", "hosts", "access_log", "proxies",
        "page", "service_account", "pod_network", "pod_port", "max_unavailable", "pod", "autoscaling",
    )
)  # fmt: skip
_DEFAULT_GATEWAY: Final = GatewaySpec()
_DRAIN_SECONDS: Final = 20  # of members that share devices: far more than a step takes, and less than queue-proxy's 30 s


class FleetSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fleet: one gateway routes requests by `model` to pipelines, most of them at zero."""

    kind: Literal["Fleet"]
    name: str
    namespace: str = "default"
    image: str
    # A folder of PipelineSpecs, or a list of files and of specs written here. They may leave out fields that the fleet has.
    members: str | list[str | dict[str, Any]]
    gateway: GatewaySpec = GatewaySpec()  # its process; api_keys_secret has an entry of keys for each member, by its name
    store: StoreSpec
    kv_store: KVStoreSpec | None = None  # of members that name none
    network: NetworkSpec = NetworkSpec()
    tracing: Tracing | None = None
    eventing: EventingSpec | None = None  # a Broker and a gateway for events of all members; unset: HTTP only
    monitoring: MonitoringSpec | None = None  # of the gateway and all members
    log_level: str = "info"
    # Most pods of all members' stages at once: members take turns, one pod for each stage. Unset: each scales by itself.
    max_devices: Positive | None = None

    def __post_init__(self) -> None:
        for name in _changed(self.gateway) - _OF_PROCESS:
            raise SpecError(f"$.gateway.{name}: concerns one pipeline: set it in the spec of a member")
        if len(self.gateway.api_keys_secrets) > 1:
            raise SpecError("$.gateway.api_keys_secret: a fleet takes one Secret, with an entry of keys for each member")
        self.door()  # checks what it has in common with pipelines, such as its name

    @property
    def token_secret(self) -> str:
        return f"{self.name}-pipeline"

    def door(self) -> PipelineSpec:
        """A pipeline without a model that has the fleet's gateway: its names, access, network and pod."""
        return PipelineSpec(
            name=self.name,
            namespace=self.namespace,
            model=ModelSpec(name="none"),
            cut="0:1",
            image=self.image,
            gateway=self.gateway,
            store=self.store,
            network=self.network,
            tracing=self.tracing,
            eventing=self.eventing,
            monitoring=self.monitoring,
            log_level=self.log_level,
        )


def load_fleet(path: Path) -> tuple[FleetSpec, list[PipelineSpec]]:
    """Reads a fleet and its members' specs. Paths in it are relative to its file.

    Raises SpecError; its message begins with the file's name.
    """
    document = read_yaml(path)
    try:
        fleet = msgspec.convert(document, FleetSpec)
    except msgspec.ValidationError as error:
        cause = error.__cause__ if isinstance(error.__cause__, SpecError) else describe_fault(document, FleetSpec, "$")
        raise SpecError(f"{path}: {cause}") from error
    members = [_member(fleet, said, where) for said, where in _members(fleet, path)]
    for what, names in (("member", [each.name for each in members]), ("model", [each.model.name for each in members])):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SpecError(f"{path}: $.members: {what} {repeated[0]} is there twice")
    if fleet.name in {each.name for each in members}:
        raise SpecError(f"{path}: $.name: {fleet.name} is a member's name, too")
    if not members:
        raise SpecError(f"{path}: $.members: there is none")
    return fleet, members


def is_fleet(path: Path) -> bool:
    """Whether a file describes a fleet, rather than a pipeline. Raises SpecError if it is no YAML."""
    document = read_yaml(path)
    return isinstance(document, dict) and document.get("kind") == KIND


def _members(fleet: FleetSpec, path: Path) -> list[tuple[Any, str]]:
    """The documents of the members, each with its place: a file, or a path in the fleet's own."""
    if isinstance(fleet.members, str):
        folder = path.parent / fleet.members
        if not folder.is_dir():
            raise SpecError(f"{path}: $.members: {folder} is no folder")
        return [(read_yaml(file), str(file)) for file in sorted(folder.iterdir()) if file.suffix in (".yaml", ".yml")]
    return [
        (read_yaml(path.parent / each), str(path.parent / each))
        if isinstance(each, str)
        else (each, f"{path}: $.members[{number}]")
        for number, each in enumerate(fleet.members)
    ]


def _member(fleet: FleetSpec, document: Any, where: str) -> PipelineSpec:
    """The spec of a member, with what it shares with the fleet. Raises SpecError if the two contradict each other."""
    if not isinstance(document, dict):
        raise SpecError(f"{where}: is no PipelineSpec")
    shared = {name: getattr(fleet, name, fleet.token_secret) for name in _SHARED}
    document = {**msgspec.to_builtins({"kv_store": fleet.kv_store, **shared}), **document}
    if fleet.max_devices is not None:
        document = _giving_way(document)
    try:
        spec = spec_from_dict(document)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
    for name, value in shared.items():
        if getattr(spec, name) != value:
            raise SpecError(f"{where}: $.{name}: a member has the fleet's, so leave it out")
    for name in sorted(_changed(spec.gateway) & _OF_PROCESS):
        raise SpecError(f"{where}: $.gateway.{name}: is the fleet's: members share its gateway")
    if spec.monitoring is not None:
        raise SpecError(f"{where}: $.monitoring: a member has the fleet's, so leave it out")
    if spec.eventing is not None:
        raise SpecError(f"{where}: $.eventing: is the fleet's: one Broker takes the events of all members, so leave it out")
    if fleet.max_devices is not None:
        for path, scaling in _autoscaling(spec):
            if (scaling.min_scale, scaling.max_scale) != (0, 1):
                raise SpecError(f"{where}: {path}: members that share max_devices scale between 0 and 1")
        stages = spec.stages or len(parse_cut(spec.cut or ""))
        if stages > fleet.max_devices:
            raise SpecError(f"{where}: has {stages} stages, more than max_devices, {fleet.max_devices}")
    return spec


def _giving_way(document: dict[str, Any]) -> dict[str, Any]:
    """The member's document with pods that go soon after their last request, because others wait for their devices."""
    # Knative ends a pod after its timeout, before the end of queue-proxy's drain of 30 s. KV is saved after the drain.
    drain = {} if document.get("kv_store") else {"timeout_seconds": _DRAIN_SECONDS}
    stage = {**drain, **(document.get("stage") or {})}
    soon = {"scale_down_delay_seconds": 0, "window_seconds": 6, "max_scale": 1}
    autoscaling = {**soon, **(stage.get("autoscaling") or {})}
    return {**document, "stage": {**stage, "autoscaling": autoscaling}}


def _autoscaling(spec: PipelineSpec) -> Iterator[tuple[str, Autoscaling]]:
    yield "$.stage.autoscaling", spec.stage.autoscaling
    for number, override in enumerate(spec.stage_overrides):
        yield f"$.stage_overrides[{number}].autoscaling", changed(spec.stage, override, number).autoscaling


def _changed(gateway: GatewaySpec) -> set[str]:
    return {name for name in gateway.__struct_fields__ if getattr(gateway, name) != getattr(_DEFAULT_GATEWAY, name)}
