"""Waits until objects are Ready, or cannot become it any more."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import HopelessPod, diagnose, hopeless_pod, hopeless_pods, next_step
from knative.cluster.errors import DeployFailed
from knative.cluster.history import INSTANCE
from knative.cluster.readiness import SERVING, Readiness, readiness
from knative.spec.kubernetes_object import KubernetesObject

_WATCH_SECONDS: Final = 2
_EVENTING_SETTLES_SECONDS: Final = 30
"""Eventing's conditions are False on the way to True; one that stays so for as long is not on its way."""


@dataclass(slots=True)
class _Waiting:
    """What was last said of an object, and since when it is said to have failed."""

    reason: str = ""
    failed_since: float | None = None
    started: float = field(default_factory=time.monotonic)


class ReadinessWait:
    """Of one deployment; `check` is called again and again and may raise, `say` gets what changes."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        say: Callable[[str], None],
        timeout_seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._check = check
        self._known_hopeless: set[HopelessPod] = set()

    def note_hopeless(self, services: list[KubernetesObject]) -> None:
        """Before they are applied: pods that fail already, and whose cause may be mended, get another try."""
        for ref in map(Ref.of, services):
            live = self._cluster.get(ref)
            if live is not None:
                self._known_hopeless |= set(hopeless_pods(self._cluster, live))

    def await_ready(self, objects: list[KubernetesObject]) -> dict[str, KubernetesObject]:
        """Name → object as it is when Ready. Raises DeployFailed as soon as one cannot become Ready, or is not in time."""
        ready: dict[str, KubernetesObject] = {}
        for (api_version, kind), group in groupby(objects, key=lambda each: (each["apiVersion"], each["kind"])):
            members = list(group)
            selector = f"{INSTANCE}={members[0]['metadata']['labels'][INSTANCE]}"
            waiting = {each["metadata"]["name"]: _Waiting() for each in members}
            while waiting:
                self._check()
                for live in self._cluster.watch(api_version, kind, self._namespace, selector, _WATCH_SECONDS):
                    if live["metadata"]["name"] in waiting and self._note(live, waiting):
                        ready[live["metadata"]["name"]] = live
                    if not waiting:
                        break
                for name in list(waiting):
                    self._give_up_if_hopeless(Ref(api_version, kind, self._namespace, name), waiting[name])
        return ready

    def _note(self, live: KubernetesObject, waiting: dict[str, _Waiting]) -> bool:
        """Whether the object is Ready; says what changed."""
        name, state = live["metadata"]["name"], readiness(live)
        if state.ready:
            del waiting[name]
            self._say(f"{_called(live)} is ready")
            return True
        if state.ready is False and live["apiVersion"] == SERVING:
            raise DeployFailed(_failure(f"{name} failed: {state.reason}", diagnose(self._cluster, live)))
        known = waiting[name]
        known.failed_since = None if state.ready is None else known.failed_since or time.monotonic()
        if state.reason and state.reason != known.reason:
            known.reason = state.reason
            self._say(f"{_called(live)}: {state.reason}")
        return False

    def _give_up_if_hopeless(self, ref: Ref, known: _Waiting) -> None:
        live = self._cluster.get(ref)
        if live is None:
            raise DeployFailed(f"{ref} was deleted by someone else while we waited for it")
        reason = self._hopeless(live) if ref.api_version == SERVING else self._settled(known, readiness(live))
        if reason is None and time.monotonic() > known.started + self._timeout_seconds:
            reason = f"not ready after {self._timeout_seconds:g} s; --timeout waits longer"
        if reason is not None:
            raise DeployFailed(_failure(f"{_called(live)} does not become ready: {reason}", diagnose(self._cluster, live)))

    def _hopeless(self, live: KubernetesObject) -> str | None:
        pod = hopeless_pod(self._cluster, live, frozenset(self._known_hopeless))
        return pod.reason if pod is not None else None

    def _settled(self, known: _Waiting, state: Readiness) -> str | None:
        since = known.failed_since
        return state.reason if since is not None and time.monotonic() > since + _EVENTING_SETTLES_SECONDS else None


def _called(live: KubernetesObject) -> str:
    """Services, of which there are most, by their name alone."""
    name: str = live["metadata"]["name"]
    return name if live["apiVersion"] == SERVING else f"{live['kind']} {name}"


def _failure(headline: str, details: list[str]) -> str:
    return "\n  ".join([headline, *details, next_step([headline, *details])])
