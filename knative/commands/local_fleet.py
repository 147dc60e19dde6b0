"""The fleet that `run` serves: its members' pipelines on this machine, and how they follow the files that describe them."""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from knative.commands.local_pipeline import as_in_specs, ensure_published, local_pipeline
from knative.local.kubelet.containers import NamedData
from knative.local.platform import Platform
from knative.render.eventing import eventing_objects
from knative.render.fleet import fleet_door, fleet_gateway, fleet_lease, member_files
from knative.render.rendering import RenderFailed
from knative.spec.errors import SpecError
from knative.spec.fleet_spec import FleetSpec, load_fleet
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import PipelineSpec
from storage.errors import StorageError
from storage.store.object_store import ObjectStore

_LOOK_SECONDS: Final = 1.0


class LocalFleet:
    """A fleet on this machine. `objects` are what a platform applies."""

    def __init__(
        self, path: Path, store: ObjectStore, named_secrets: NamedData, cache: Path, kv_key: str, console: Console
    ) -> None:
        """Reads the fleet and publishes the packaged model if a member wants it.

        named_secrets: Secrets by name; those that it lacks are generated. cache: folder for verified weights. kv_key: encrypts
        idle conversations in the store. Raises SpecError, RenderFailed or a StorageError.
        """
        self._path = path
        self._store = store
        self._cache = cache
        self._kv_key = kv_key
        self._console = console
        self._seen = self._signature()
        self.fleet, members = self._read()
        self.models = [each.model.name for each in members]
        self.secrets: dict[str, dict[str, str]] = {
            str(self.fleet.store.secret): as_in_specs(store)[1],
            self.fleet.token_secret: {"token": secrets.token_hex(16)},
            **{name: {each.name: secrets.token_hex(16) for each in members} for name in self.fleet.gateway.api_keys_secrets},
            **{name: dict(values) for name, values in named_secrets.items()},
        }
        self.objects = self._render(members)

    def api_key(self) -> str | None:
        """An API key of the first member; None if none is needed."""
        for name in self.fleet.gateway.api_keys_secrets:
            return next(iter(self.secrets[name].values()), "").split()[0]
        return None

    async def follow(self, platform: Platform, say: Callable[[str], None]) -> None:
        """Applies changes of the fleet's files to the platform, until it is cancelled.

        Services that a member no longer needs are deleted once they have no pods.
        """
        leaving: list[KubernetesObject] = []
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            leaving = [each for each in leaving if not await _deleted(platform, each)]
            if (seen := self._signature()) == self._seen:
                continue
            self._seen = seen
            try:
                self.fleet, members = self._read()
                wanted = await asyncio.to_thread(self._render, members)
            except (SpecError, RenderFailed, StorageError) as error:
                say(f"the fleet stays as it is: {error}")
                continue
            before, after = (
                {(each["kind"], each["metadata"]["name"]): each for each in objects} for objects in (self.objects, wanted)
            )
            changed = [each for key, each in after.items() if before.get(key) != each]
            gone = [each for key, each in before.items() if key not in after]
            await platform.apply(changed)
            await platform.delete([each for each in gone if each["kind"] == "ConfigMap"])
            gone_services = [each for each in [*leaving, *gone] if each["kind"] == "Service"]
            leaving = [each for each in gone_services if ("Service", each["metadata"]["name"]) not in after]
            self.objects, self.models = wanted, [each.model.name for each in members]
            say(f"the fleet has {len(members)} members: {len(changed)} objects changed, {len(gone)} removed")

    def _read(self) -> tuple[FleetSpec, list[PipelineSpec]]:
        fleet, members = load_fleet(self._path)
        return msgspec.structs.replace(fleet, store=as_in_specs(self._store)[0]), members

    def _render(self, members: list[PipelineSpec]) -> list[KubernetesObject]:
        door = [*fleet_lease(self.fleet), fleet_gateway(self.fleet)]
        if self.fleet.eventing is not None:
            door += [fleet_gateway(self.fleet, for_events=True), *eventing_objects(fleet_door(self.fleet))]
        return [*door, *(each for member in members for each in self._member(member))]

    def _member(self, spec: PipelineSpec) -> Iterator[KubernetesObject]:
        manifest = ensure_published(self._store, spec.model.name, spec.model.dtype, self._console)
        local = local_pipeline(self._store, manifest, 1, spec, self.secrets, self._cache, self._kv_key)
        self.secrets = {**{name: dict(values) for name, values in local.secrets.items()}, **self.secrets}
        for objects in member_files(dataclasses.replace(local.pipeline, fleet=self.fleet.name)).values():
            yield from objects

    def _signature(self) -> object:
        """Differs after a file of the fleet was changed, added or removed. Files in other folders than the fleet's and its
        members' are not looked at."""
        folder = self._path.parent
        files = [self._path, *folder.glob("*.yaml"), *folder.glob("*/*.yaml")]
        return {file: file.stat().st_mtime_ns for file in files if file.exists()}


async def _deleted(platform: Platform, each: KubernetesObject) -> bool:
    """Deletes a Service if it has no pods. Returns whether it is gone."""
    service = platform.services.get((each["metadata"]["namespace"], each["metadata"]["name"]))
    if service is not None and any(revision.pods for revision in service.revisions):
        return False
    await platform.delete([each])
    return True
