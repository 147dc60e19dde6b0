"""A Knative Service on one machine: its URL on a port, its revisions, and the split of traffic among them."""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from knative.local.errors import ManifestRefused, UnknownRevision
from knative.local.http.messages import HttpError
from knative.local.http.server import THIS_MACHINE, Exchange, HttpServer
from knative.local.serving.revisions import Revision, RevisionName

_log = logging.getLogger(__name__)

_READY_CHECK_SECONDS: Final = 0.1

MakeRevision = Callable[[RevisionName, Mapping[str, Any]], Revision]


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    percent: int
    revision: Revision


class LocalService:
    """A Service. `server` listens at its URL; call `apply` with its manifest and with each change of it."""

    def __init__(self, name: str, namespace: str, make_revision: MakeRevision) -> None:
        self.name = name
        self.namespace = namespace
        self.revisions: list[Revision] = []  # oldest first
        self.traffic: list[TrafficTarget] = []
        self._make_revision = make_revision
        self.server = HttpServer(self._serve)
        self._rollout: asyncio.Task[None] | None = None

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Applies the Service's manifest. A changed template becomes a new revision, to which traffic moves when it is ready.

        Raises UnknownRevision, ManifestRefused, UnsupportedManifest or SettingsError before anything is started.
        """
        template = manifest["spec"]["template"]
        targets = manifest["spec"].get("traffic") or [{"latestRevision": True, "percent": 100}]
        names = [revision.name.revision for revision in self.revisions]
        changed = not self.revisions or self.revisions[-1].template != template
        if changed:
            name = template.get("metadata", {}).get("name") or f"{self.name}-{len(self.revisions) + 1:05d}"
            if name in names:
                raise ManifestRefused(
                    f"{self.name}: spec.template.metadata.name: {name!r} is another template's; change it, too"
                )
            names.append(name)
        for target in targets:
            if (wanted := target.get("revisionName")) and wanted not in names:
                raise UnknownRevision(f"spec.traffic: revision {wanted!r} does not exist; there are {', '.join(names)}")
        if changed:
            revision = self._make_revision(RevisionName(self.namespace, self.name, name), template)
            self.revisions.append(revision)
            revision.start()
        by_name = dict(zip(names, self.revisions, strict=True))
        chosen = [(each["percent"], each.get("revisionName") or names[-1]) for each in targets if each.get("percent")]
        traffic = [TrafficTarget(percent, by_name[name]) for percent, name in chosen]
        if self._rollout is not None:
            self._rollout.cancel()
        if not self.traffic:
            self._set_traffic(traffic)  # there is no earlier revision that could serve meanwhile
        else:
            self._rollout = asyncio.create_task(self._move(traffic), name=f"rollout of {self.name}")

    async def stop(self, grace_seconds: float) -> None:
        if self._rollout is not None:
            self._rollout.cancel()
        await asyncio.gather(*(revision.stop(grace_seconds) for revision in self.revisions))
        self.server.close()

    async def _serve(self, exchange: Exchange) -> None:
        exchange.peers.append(THIS_MACHINE)  # the ingress is a proxy of its own
        if not self.traffic:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.name} has no revision yet")
        if len(self.traffic) == 1:
            target = self.traffic[0]
        else:
            target = random.choices(self.traffic, [target.percent for target in self.traffic])[0]
        await target.revision.serve(exchange)

    async def _move(self, traffic: list[TrafficTarget]) -> None:
        """Waits until every revision in `traffic` is ready, then makes it the split. If one fails, the old split stays."""
        for target in traffic:
            revision = target.revision
            while not revision.initialized:
                if revision.failure is not None:
                    _log.error("%s gets no traffic: %s", revision.name.revision, revision.failure)
                    return
                await asyncio.sleep(_READY_CHECK_SECONDS)
        self._set_traffic(traffic)

    def _set_traffic(self, traffic: list[TrafficTarget]) -> None:
        self.traffic = traffic
        routed = {target.revision for target in traffic}
        for revision in self.revisions:
            revision.reachable = revision in routed
