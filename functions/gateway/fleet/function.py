"""A fleet's gateway, as the function that `python -m functions` runs."""

import logging
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Final

from prometheus_client import CollectorRegistry

from eventing.problems import Problem
from functions.configuration.config import FleetConfig
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.app import MAX_REQUEST_BYTES, configured_batches
from functions.gateway.build import endpoints_watch
from functions.gateway.fleet.grant_record import LeaseRecord, LocalRecord
from functions.gateway.fleet.grants import Grants, MemberPods
from functions.gateway.fleet.members import Members, Version
from functions.gateway.fleet.overview import FleetCollector, Overview
from functions.gateway.fleet.parts import Parts, Turn
from functions.gateway.fleet.routing import MemberRouter, fleet_admission, own_app
from functions.gateway.jobs.batches import Batches
from functions.gateway.stages.kubernetes_api import LEASES, KubernetesAPI
from functions.hosting.answering import Service
from functions.hosting.management import Management
from functions.hosting.startup import StartUp
from storage.errors import StorageError

_log: Final = logging.getLogger(__name__)

_THREADS: Final = 768  # for requests that wait or are answered
_BATCHES_SECONDS: Final = 10.0  # between looks for open batches of members that are not loaded
_REQUEST_BYTES: Final = 8 * MAX_REQUEST_BYTES


class FleetFunction:
    """The gateway of a fleet: its HTTP service, its members and their parts, from start to drain and close."""

    def __init__(self, config: FleetConfig, environ: Mapping[str, str], start_up: StartUp) -> None:
        """`environ` is the environment of the process, which the members' parts share.

        Raises ConfigError for TLS files that cannot be used.
        """
        self._start_up = start_up
        self._watch = endpoints_watch(config, None)
        self._grants = None if config.max_devices is None else self._shared_devices(config, config.max_devices)
        turn: Turn = (lambda *_: nullcontext()) if self._grants is None else self._grants.turn
        self.parts = Parts(self._watch, config.memory_bytes, turn)
        self.members = Members(config, environ, self.parts.retire)
        self._overview = Overview(self.members, self.parts, self._grants, self._pods, config.max_devices)
        self._metrics = GatewayMetrics()
        start_up.report_to(self._metrics.phase_ended)
        self._draining = False
        self._closed = threading.Event()
        registry = CollectorRegistry()
        registry.register(FleetCollector(self._metrics.registry, self.parts.registries, self._overview.metrics))
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
        self.members.watch.start()
        self.parts.thread.start()
        self._overview.thread.start()
        if self._grants is not None:
            self._grants.thread.start()
        threading.Thread(target=self._note_start, name="start-up", daemon=True).start()
        threading.Thread(target=self._resume_batches, name="fleet-batches", daemon=True).start()

    def drain(self) -> None:
        """Makes `/readyz` report not ready, so that new requests go to other gateways.

        Requests that still arrive are answered.
        """
        self._draining = True

    def close(self) -> None:
        self._closed.set()
        self.members.watch.stop()
        self._overview.stop()
        self.parts.close()
        if self._grants is not None:
            self._grants.stop()
        if self._watch is not None:
            self._watch.slices.stop()

    def _shared_devices(self, config: FleetConfig, max_devices: int) -> Grants:
        name = secrets.token_hex(6)
        record: LocalRecord | LeaseRecord = LocalRecord()
        if config.lease is not None and config.kubernetes_api is not None:
            record = LeaseRecord(KubernetesAPI(config.kubernetes_api, config.namespace, LEASES), config.lease, name)
        services = lambda: (each.services for each in self.members.versions())  # noqa: E731
        return Grants(max_devices, services, self._pods, record, name)

    def _resume_batches(self) -> None:
        """Loads the parts of members that have open batches, after this gateway's start or another gateway's end."""
        known: weakref.WeakKeyDictionary[Version, Batches] = weakref.WeakKeyDictionary()
        while not self._closed.wait(_BATCHES_SECONDS):
            loaded = {part.version for part in self.parts.loaded()}
            for version in [each for each in self.members.versions() if each.percent is None and each.serves_batches]:
                if version in loaded or version.config is None or self._draining:
                    continue
                try:
                    batches = known.get(version) or configured_batches(version.config)
                    if batches is not None and next(iter(known.setdefault(version, batches).open()), None) is not None:
                        with self.parts.use(version) as part:
                            part.load(wakes=False)
                except (StorageError, Problem) as error:
                    _log.warning("open batches of member %s are not looked for: %s", version.member, error)

    def _pods(self, services: Sequence[str]) -> MemberPods:
        counts = [] if self._watch is None else [self._watch.pods_of(service) for service in services]
        ready = bool(counts) and all(each.serves for each in counts)
        # A stage's last pod serves while it leaves; if another stage has none, all are woken, and that pod gets a successor.
        lasting = sum(ready and each.pods == each.terminating for each in counts)
        return MemberPods(sum(each.pods for each in counts), sum(each.terminating for each in counts) - lasting, ready)

    def _note_start(self) -> None:
        self.members.listed.wait()
        self._start_up.mark("connect")
        self._metrics.ready.set(1)

    def _sick(self) -> str | None:
        for part in self.parts.loaded():
            if (function := part.function) is not None and (cause := function.running.scheduler.sick()) is not None:
                return f"{part.version.member}: {cause}"
        return None

    def _ready(self) -> tuple[bool, Mapping[str, object]]:
        ready = self.members.listed.is_set() and not self._draining
        return ready, {"start_up": self._start_up.phases(), "members": self._overview.counts()}
