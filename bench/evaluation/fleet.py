"""The pods of one stage in the simulator, scaled by the platform's own autoscaler.

Ready pods are a number; starting and leaving ones are processes of simpy. What `knative/local/serving/revisions.py` does every
second and every two seconds happens here on the simulation's clock.
"""

from collections.abc import Generator, Sequence
from typing import Final

import simpy

from knative.local.autoscaler.hpa import SYNC_SECONDS, HorizontalPodAutoscaler, hpa_spec
from knative.local.autoscaler.kpa import TICK_SECONDS
from knative.local.autoscaler.revision_autoscaler import RevisionAutoscaler
from knative.local.autoscaler.revision_settings import RevisionSettings
from knative.local.kubelet.pods import PodTiming
from knative.webhook.autoscaling_annotations import HPA

SCRAPE_SECONDS: Final = 1.0
_DRAIN_SECONDS: Final = PodTiming().drain_quiet_seconds
_Wait = Generator[simpy.Event, None, None]


def reconcile_forever(env: simpy.Environment, fleets: "Sequence[Fleet]") -> _Wait:
    while True:
        for _ in range(round(TICK_SECONDS / SCRAPE_SECONDS)):
            yield env.timeout(SCRAPE_SECONDS)
            for fleet in fleets:
                fleet.record()
        for fleet in fleets:
            fleet.decide()


class Fleet:
    """The simulation sets `in_flight`, requests, and `busy_share`, the busy part of the ready pods' time."""

    def __init__(self, env: simpy.Environment, settings: RevisionSettings, start_seconds: float) -> None:
        """start_seconds: of a pod. The settings' minimum of pods is ready from the beginning."""
        self.ready = settings.min_scale
        self.starting = 0
        self.leaving = 0
        self.cold_starts = 0
        self.replica_seconds = 0.0
        self.in_flight = 0.0
        self.busy_share = 0.0
        self._env = env
        self._start_seconds = start_seconds
        self._unwanted = 0  # starting pods that end as soon as they have started
        self._counted_at = 0.0
        self._hpa = HorizontalPodAutoscaler(hpa_spec(settings)) if settings.autoscaler_class == HPA else None
        self.autoscaler = RevisionAutoscaler(settings, ready=self.ready, now=env.now)

    @property
    def staying(self) -> int:
        return self.ready + self.starting - self._unwanted

    def poke(self) -> None:
        """A request finds the stage at zero: it is scaled at once, not at the next tick."""
        if self.staying or self._hpa is not None:
            return
        self.autoscaler.record(self._env.now, 1.0, 1.0)
        self.decide()

    def count(self) -> None:
        """Replica-seconds up to now."""
        held = self.ready + self.starting - self._unwanted + self.leaving
        self.replica_seconds += held * (self._env.now - self._counted_at)
        self._counted_at = self._env.now

    def record(self) -> None:
        if self.ready or self.in_flight:
            self.autoscaler.record(self._env.now, self.in_flight, 0.0)

    def decide(self) -> None:
        now = self._env.now
        if self._hpa is not None:
            if now % SYNC_SECONDS < TICK_SECONDS and now >= SYNC_SECONDS:
                self._scale_to(self._hpa.decide(now, [100 * self.busy_share] * self.ready, unready=self.starting))
            return
        self.autoscaler.decide(now, self.ready)
        self._scale_to(self.autoscaler.reconcile(now, replicas=self.staying, ready=self.ready).replicas)

    def _scale_to(self, replicas: int) -> None:
        """Like a ReplicaSet: pods that are not ready end first."""
        self.count()
        for _ in range(replicas - self.staying):
            self.starting += 1
            self.cold_starts += 1
            self._env.process(self._start())
        surplus = max(0, self.staying - replicas)
        from_starting = min(surplus, self.starting - self._unwanted)
        self._unwanted += from_starting
        if surplus > from_starting:
            self._env.process(self._leave(surplus - from_starting))

    def _start(self) -> _Wait:
        yield self._env.timeout(self._start_seconds)
        self.count()
        self.starting -= 1
        if self._unwanted:
            self._unwanted -= 1
        else:
            self.ready += 1

    def _leave(self, pods: int) -> _Wait:
        self.ready -= pods
        self.leaving += pods
        yield self._env.timeout(_DRAIN_SECONDS)
        self.count()
        self.leaving -= pods
