"""Builds a running scheduler from the configuration: sender, client of the stages, placement, watch of the EndpointSlices.

It imports nothing else, because a gateway wakes its stages before it imports its APIs.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from eventing.http.delivery import Sender
from eventing.http.pod_network import PodNetwork
from functions.configuration.config import FleetConfig, GatewayConfig
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.prefix_sharing import PrefixSharing
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.client import PipelineIdentity, StageClient
from functions.gateway.stages.endpoints import EndpointsWatch, service_name
from functions.gateway.stages.kubernetes_api import KubernetesAPI
from functions.gateway.stages.readiness import EarlyReadiness
from functions.gateway.stages.routes import Placement
from functions.observing.telemetry import make_tracer
from functions.observing.tracing import Tracer


@dataclass(frozen=True, slots=True)
class RunningScheduler:
    scheduler: Scheduler
    tracer: Tracer
    services: Sequence[str]  # names of the stages' Services
    watch: EndpointsWatch | None
    _sender: Sender
    _readiness: EarlyReadiness
    _owns_watch: bool

    def close(self) -> None:
        """Stops the watch, ends all sequences, closes the connections to the stages and exports the remaining traces."""
        if self.watch is not None:
            for service in self.services:
                self.watch.unfollow(service)
            if self._owns_watch:
                self.watch.slices.stop()
        self._readiness.stop()
        self.scheduler.close()
        self._sender.close()
        self.tracer.close()


def endpoints_watch(config: GatewayConfig | FleetConfig, services: Sequence[str] | None) -> EndpointsWatch | None:
    """Starts a watch of the EndpointSlices of `services` and returns it. If `services` is None, watches all in the namespace.

    Returns None if no Kubernetes API is configured. Raises ConfigError for TLS files that cannot be used.
    """
    if config.kubernetes_api is None:
        return None
    pods = PodNetwork(config.pod_network, config.pod_port, secure=config.tls.load() is not None)
    # Members that share devices use a terminating pod as long as it answers: its successor needs a device of its own.
    keeps_last = isinstance(config, FleetConfig) and config.max_devices is not None
    watch = EndpointsWatch(KubernetesAPI(config.kubernetes_api, config.namespace), pods, services, keeps_last=keeps_last)
    watch.slices.start()
    return watch


def start_scheduler(config: GatewayConfig, shared: EndpointsWatch | None = None) -> RunningScheduler:
    """Starts a scheduler for the configured stages. It sends them nothing before the first sequence or `wake`.

    `shared` is a watch that other schedulers use, too; if it is None, the scheduler gets a watch of its own. Raises ConfigError
    for TLS files that cannot be used.
    """
    identity = PipelineIdentity(
        fingerprint=config.pipeline,
        token=config.pipeline_token,
        source=f"/pipelines/{config.pipeline}/gateways/{secrets.token_hex(6)}",
        first_layers=tuple(first for (first, _), _ in config.stages),
    )
    tracer = make_tracer(config.traces_endpoint, "lamina-gateway", {"lamina.pipeline": config.pipeline})
    tls = config.tls.load()
    sender = Sender(tls=tls)
    client = StageClient(sender, identity, config.step_timeout_seconds, tracer, pods_only=tls is not None)
    urls = [url for _, url in config.stages]
    services = config.stage_services or [service_name(url) for url in urls]
    limits = SchedulerLimits(
        queue_limit=config.queue_limit,
        chunk_tokens=config.chunk_tokens,
        prompt_bytes=config.prompt_bytes,
        micro_batch_sequences=config.micro_batch_sequences,
        stages_at_once=config.stages_at_once,
        draft_tokens=config.draft_tokens,
        cold_start_timeout_seconds=config.cold_start_timeout_seconds,
        prompt_seconds=math.inf if config.objective is None else config.objective.prompt_seconds,
    )
    placement = Placement(urls, watched=config.kubernetes_api is not None, pods_only=tls is not None)
    scheduler = Scheduler(client, placement, limits, PrefixSharing(config.pipeline, config.sharing))
    readiness = EarlyReadiness(scheduler.endpoints_changed, tls)
    watch = shared or endpoints_watch(config, services)
    if watch is not None:
        for stage, service in enumerate(services):
            watch.follow(service, partial(readiness.endpoints_changed, stage))
    return RunningScheduler(scheduler, tracer, services, watch, sender, readiness, shared is None)
