"""A Knative Service on one machine: its URL on a port, its revisions, and which of them gets how much of the traffic."""

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
class Route:
    percent: int
    revision: Revision


class LocalService:
    """`apply` takes the manifest and each change of it; the URL is there from `listen` on."""

    def __init__(self, name: str, namespace: str, make_revision: MakeRevision) -> None:
        self.name = name
        self.namespace = namespace
        self.revisions: list[Revision] = []
        """Oldest first."""
        self.routes: list[Route] = []
        self._make_revision = make_revision
        self._server = HttpServer(self._serve)
        self._rollout: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def cluster_url(self) -> str:
        return f"http://{self.name}.{self.namespace}.svc.cluster.local"

    async def listen(self, port: int) -> None:
        """Raises OSError where the port is taken."""
        await self._server.start(port)

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """A changed template is a new revision, to which traffic moves once it is ready.

        Raises UnknownRevision or ManifestRefused before anything is started.
        """
        spec = manifest["spec"]
        template, targets = spec["template"], spec.get("traffic") or [{"latestRevision": True, "percent": 100}]
        changed = not self.revisions or self.revisions[-1].template != template
        name = self._next_name(template) if changed else self.revisions[-1].name.revision
        self._refuse_unknown(targets, name)
        if changed:
            revision = self._make_revision(RevisionName(self.namespace, self.name, name), template)
            self.revisions.append(revision)
            revision.start()
        traffic = self._traffic(targets)
        if self._rollout is not None:
            self._rollout.cancel()
        if not self.routes:
            self._set_routes(traffic)  # there is nothing to stay with meanwhile
        else:
            self._rollout = asyncio.create_task(self._move(traffic), name=f"rollout of {self.name}")

    async def stop(self, grace_seconds: float) -> None:
        if self._rollout is not None:
            self._rollout.cancel()
        await asyncio.gather(*(revision.stop(grace_seconds) for revision in self.revisions))
        self._server.close()

    async def _serve(self, exchange: Exchange) -> None:
        exchange.seen_from.append(THIS_MACHINE)  # The ingress is a proxy of its own.
        if not self.routes:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.name} has no revision yet")
        if len(self.routes) == 1:
            route = self.routes[0]
        else:
            route = random.choices(self.routes, [route.percent for route in self.routes])[0]
        await route.revision.serve(exchange)

    def _next_name(self, template: Mapping[str, Any]) -> str:
        """The template's own, or the Service's with the number of the generation."""
        own: str | None = template.get("metadata", {}).get("name")
        if own is None:
            return f"{self.name}-{len(self.revisions) + 1:05d}"
        if own in self._names:
            raise ManifestRefused(f"{self.name}: spec.template.metadata.name: {own!r} is another template's; change it, too")
        return own

    @property
    def _names(self) -> list[str]:
        return [revision.name.revision for revision in self.revisions]

    def _refuse_unknown(self, targets: list[Mapping[str, Any]], latest: str) -> None:
        have = list(dict.fromkeys([*self._names, latest]))
        for target in targets:
            if (wanted := target.get("revisionName")) and wanted not in have:
                raise UnknownRevision(f"spec.traffic: revision {wanted!r} does not exist; there are {', '.join(have)}")

    def _traffic(self, targets: list[Mapping[str, Any]]) -> list[Route]:
        by_name = dict(zip(self._names, self.revisions, strict=True))
        latest = self.revisions[-1].name.revision
        return [Route(each["percent"], by_name[each.get("revisionName") or latest]) for each in targets if each.get("percent")]

    async def _move(self, traffic: list[Route]) -> None:
        """Waits for every revision that is to get traffic; a failed one keeps the routes as they are."""
        for route in traffic:
            revision = route.revision
            while not revision.initialized:
                if revision.failure is not None:
                    _log.error("%s gets no traffic: %s", revision.name.revision, revision.failure)
                    return
                await asyncio.sleep(_READY_CHECK_SECONDS)
        self._set_routes(traffic)

    def _set_routes(self, traffic: list[Route]) -> None:
        self.routes = traffic
        routed = {route.revision for route in traffic}
        for revision in self.revisions:
            revision.reachable = revision in routed
