"""A fleet's gateway as a function."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry

from functions.configuration.config import FleetConfig
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.app import MAX_REQUEST_BYTES
from functions.gateway.build import endpoints_watch
from functions.gateway.fleet.grants import Grants
from functions.gateway.fleet.members import Members, Version
from functions.gateway.fleet.metrics import FleetCollector
from functions.gateway.fleet.overview import Overview
from functions.gateway.fleet.parts import Parts
from functions.gateway.fleet.routing import MemberRouter, fleet_admission, own_app
from functions.hosting.management import Management
from functions.hosting.server import Service
from functions.hosting.startup import StartUp

STATES: Final = ("asleep", "loading", "loaded", "failed")
_THREADS: Final = 768  # for requests that wait or are answered
_REQUEST_BYTES: Final = 8 * MAX_REQUEST_BYTES


class FleetFunction:
    """The gateway of a fleet: HTTP service, members and their parts, from start to drain and close."""

    def __init__(self, config: FleetConfig, environ: Mapping[str, str], start_up: StartUp) -> None:
        """environ: of the process; members' parts share it. Raises ConfigError for TLS files that cannot be used."""
        self._start_up = start_up
        self._watch = endpoints_watch(config, None)
        self.parts = Parts(self._watch, config.memory_bytes)
        self._grants = None if config.max_devices is None else Grants(config.max_devices, self._pods, self._is_ready)
        self.members = Members(config, environ, self._forget)
        self._overview = Overview(self.members, self.parts, self._grants, self._pods, self._is_ready, config.max_devices)
        self._metrics = GatewayMetrics()
        start_up.report_to(self._metrics.phase_ended)
        self._draining = False
        registry = CollectorRegistry()
        registry.register(
            FleetCollector(
                self._metrics.registry,
                self._registries,
                self.states,
                lambda: self.parts.evictions,
                self._overview.by_model,
            )
        )
        own = own_app(
            config,
            self.members,
            self._metrics,
            lambda line: print(line, file=sys.stderr, flush=True),
            self._overview,
            lambda: self._draining,
        )
        self.service = Service(
            MemberRouter(self.members, self.parts, own, self._grants),
            Management(registry, sick=self._sick, ready=self._ready),
            fleet_admission(config, self.members),
            threads=_THREADS,
            request_bytes=_REQUEST_BYTES,
        )

    def start(self, stop: Callable[[int], None]) -> None:
        self.members.start()
        self.parts.start()
        self._overview.start()
        threading.Thread(target=self._note_start, name="start-up", daemon=True).start()

    def drain(self) -> None:
        """Makes `/readyz` report not ready, so that new requests go elsewhere. Requests that still arrive are answered."""
        self._draining = True

    def close(self) -> None:
        self.members.stop()
        self._overview.stop()
        self.parts.close()
        if self._watch is not None:
            self._watch.stop()

    def states(self) -> dict[str, int]:
        """How many members are in which state at this gateway."""
        count = Counter[str](part.state for part in self.parts.loaded())
        versions = sum(len(group) for group in self.members.models().values())
        return {state: count[state] for state in STATES} | {"asleep": max(0, versions - count.total())}

    def _forget(self, versions: Sequence[Version]) -> None:
        self.parts.retire(versions)
        if self._grants is not None:
            self._grants.forget(versions)

    def _pods(self, version: Version) -> tuple[int, int]:
        counts = [] if self._watch is None else [self._watch.pods_of(service) for service in version.services]
        return sum(pods for pods, _ in counts), sum(leaving for _, leaving in counts)

    def _is_ready(self, version: Version) -> bool:
        return self._watch is not None and all(map(self._watch.is_ready, version.services))

    def _note_start(self) -> None:
        self.members.listed.wait()
        self._start_up.mark("connect")
        self._metrics.ready.set(1)

    def _registries(self) -> Iterator[tuple[str, CollectorRegistry]]:
        for part in self.parts.loaded():
            if (function := part.function) is not None:
                yield part.version.model, function.metrics

    def _sick(self) -> str | None:
        for part in self.parts.loaded():
            if (function := part.function) is not None and (cause := function.sick()) is not None:
                return f"{part.version.member}: {cause}"
        return None

    def _ready(self) -> tuple[bool, Mapping[str, object]]:
        ready = self.members.listed.is_set() and not self._draining
        return ready, {"start_up": self._start_up.phases(), "members": self.states()}
