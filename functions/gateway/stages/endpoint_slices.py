"""EndpointSlices, as far as the gateway reads them."""

from typing import Final

import msgspec

from functions.gateway.stages.kubernetes_api import KubernetesItem

SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
SERVICE_TYPE_LABEL: Final = "networking.internal.knative.dev/serviceType"
PRIVATE: Final = f"{SERVICE_TYPE_LABEL}=Private"  # selects the slices that list a revision's pods


class Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None  # it answers, also while it terminates
    terminating: bool | None = None


class Address(msgspec.Struct):
    addresses: tuple[str, ...] = ()
    conditions: Conditions = Conditions()


class Port(msgspec.Struct):
    port: int | None = None
    name: str | None = None


class Slice(KubernetesItem):
    endpoints: tuple[Address, ...] | None = None
    ports: tuple[Port, ...] | None = None
