"""Waits until objects are Ready, and gives up early on those that cannot become Ready."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import HopelessPod, diagnose, hopeless_pods, next_step
from knative.cluster.errors import DeployFailed, NotPermitted
from knative.cluster.objects import INSTANCE, SERVING, label, newest_revision, not_owned, readiness
from knative.spec.kubernetes_object import KubernetesObject

_WATCH_SECONDS: Final = 2
_EVENTING_SETTLES_SECONDS: Final = 30  # Eventing's conditions are False on their way to True; after this long they failed
_NOT_OWNED_SECONDS: Final = 60  # how long Kubernetes may take to delete what a deleted Service of the same name owned


@dataclass(slots=True)
class _Waiting:
    reason: str = ""  # the last one that was reported
    failed_since: float | None = None
    started: float = field(default_factory=time.monotonic)


class ReadinessWait:
    """Waits until objects of one deployment are Ready.

    say: gets a line for each change. check: called at each poll, and may raise an error to end the wait, such as after losing
    the deployment's Lease. timeout_seconds: limit for the objects of one kind.
    """

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
        self.known_hopeless: set[HopelessPod] = set()  # pods that failed before this deployment; they do not end a wait

    def await_ready(self, objects: list[KubernetesObject]) -> dict[str, KubernetesObject]:
        """Waits until all objects are Ready, and returns them by name, as the cluster then has them.

        Raises DeployFailed as soon as one cannot become Ready, or at the timeout.
        """
        ready: dict[str, KubernetesObject] = {}
        for (api_version, kind), group in groupby(objects, key=lambda each: (each["apiVersion"], each["kind"])):
            members = list(group)
            selector = f"{INSTANCE}={label(members[0], INSTANCE)}"
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
        """Reports a change of the object, and removes it from `waiting` if it is Ready. Returns whether it is.

        Raises DeployFailed if a Service has failed.
        """
        name, state = live["metadata"]["name"], readiness(live)
        if state.ready:
            del waiting[name]
            self._say(f"{_display_name(live)} is ready")
            return True
        is_service, reason = live["apiVersion"] == SERVING, state.reason
        if state.ready is False and is_service:
            if not self._waits_for_predecessor(live):
                raise self._failure(live, f"{name} failed: {state.reason}")
            reason = f"waiting until Kubernetes has deleted what an earlier Service of that name left ({state.reason})"
        known = waiting[name]
        known.failed_since = None if state.ready is None else known.failed_since or time.monotonic()
        if reason and reason != known.reason:
            known.reason = reason
            self._say(f"{_display_name(live)}: {reason}")
        return False

    def _waits_for_predecessor(self, service: KubernetesObject) -> bool:
        """Whether the Service fails only because an earlier one of its name was deleted, and its objects are not gone yet.

        Such an object is a Route, or a Revision's Deployment.
        """
        if not_owned(service):
            return True
        with contextlib.suppress(NotPermitted):
            revision = newest_revision(self._cluster, service) or ""
            live = self._cluster.get(Ref(SERVING, "Revision", service["metadata"]["namespace"], revision)) if revision else None
            return live is not None and not_owned(live)
        return False

    def _give_up_if_hopeless(self, ref: Ref, known: _Waiting) -> None:
        live = self._cluster.get(ref)
        if live is None:
            raise DeployFailed(f"{ref} was deleted by someone else while this deployment waited for it")
        now, reason, passes_seconds = time.monotonic(), None, _EVENTING_SETTLES_SECONDS
        if ref.api_version == SERVING:
            passes_seconds = _NOT_OWNED_SECONDS
            hopeless = (pod for pod in hopeless_pods(self._cluster, live) if pod not in self.known_hopeless)
            reason = next((pod.reason for pod in hopeless), None)
        state = readiness(live)
        if state.ready is False and known.failed_since is not None and now > known.failed_since + passes_seconds:
            reason = state.reason
        if reason is None and now > known.started + self._timeout_seconds:
            reason = f"not ready after {self._timeout_seconds:g} s; --timeout waits longer"
        if reason is not None:
            raise self._failure(live, f"{_display_name(live)} does not become ready: {reason}")

    def _failure(self, live: KubernetesObject, headline: str) -> DeployFailed:
        lines = [headline, *diagnose(self._cluster, live)]
        return DeployFailed("\n  ".join([*lines, next_step(lines)]))


def _display_name(live: KubernetesObject) -> str:
    """Name of an object in messages: a Service, the most common kind, by name alone, others with their kind."""
    name: str = live["metadata"]["name"]
    return name if live["apiVersion"] == SERVING else f"{live['kind']} {name}"
