"""A Kubernetes Lease that keeps two deployments of one pipeline from running at the same time.

A second deployment fails and names the holder of the Lease. A Lease that was not renewed in time is taken over; its former
holder, if it still runs, stops at its next step. Times come from the machines' own clocks: if they differ by more than the
lease's duration, a Lease is taken over too early.
"""

import contextlib
import getpass
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import ClusterError, DeployInProgress, NotPermitted
from knative.cluster.objects import INSTANCE, MANAGED_BY
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object

DURATION_SECONDS: Final = 60
_RENEWALS_PER_DURATION: Final = 4
_COORDINATION: Final = "coordination.k8s.io/v1"
_FORMAT: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


def lease_ref(namespace: str, name: str) -> Ref:
    return Ref(_COORDINATION, "Lease", namespace, f"{name}-deploy")


def holder(lease: KubernetesObject) -> str:
    """Text that says who holds the Lease, and since when."""
    return f"{lease['spec'].get('holderIdentity')} since {lease['spec'].get('acquireTime')}"


class DeployLease:
    """Context manager that keeps a Lease of this process until its end: a thread renews the Lease, and leaving deletes it.

    lease: the Lease as it was acquired; None if Leases are not permitted, and then nothing is renewed or deleted.
    """

    def __init__(self, cluster: Cluster, ref: Ref, lease: KubernetesObject | None, duration_seconds: float) -> None:
        self._cluster = cluster
        self._ref = ref
        self._lease = lease
        self._duration_seconds = duration_seconds
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raises DeployInProgress if the Lease was taken over by another deployment, or deleted."""
        if self._lost:
            raise DeployInProgress(self._lost)

    def _renew(self) -> None:
        while self._lease is not None and not self._ended.wait(self._duration_seconds / _RENEWALS_PER_DURATION):
            metadata = {key: value for key, value in self._lease["metadata"].items() if key != "managedFields"}
            spec = {**self._lease["spec"], "renewTime": datetime.now(UTC).strftime(_FORMAT)}
            with contextlib.suppress(ClusterError):  # the API may be unreachable for a moment; the next renewal may be in time
                renewed = self._cluster.replace({**self._lease, "metadata": metadata, "spec": spec})
                if renewed is None:
                    live = self._cluster.get(self._ref)
                    by = "deleted" if live is None else f"taken over by {holder(live)}"
                    self._lost = (
                        f"{self._ref} was {by} during this deployment, which stops here; `status` shows what became of it"
                    )
                    return
                self._lease = renewed

    def __enter__(self) -> "DeployLease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._lease is not None and not self._lost:
            with contextlib.suppress(ClusterError):  # a Lease that is not deleted expires by itself
                self._cluster.delete(self._ref, self._lease["metadata"]["resourceVersion"])


@contextmanager
def deploy_lease(
    cluster: Cluster, namespace: str, name: str, say: Callable[[str], None], duration_seconds: float = DURATION_SECONDS
) -> Iterator[DeployLease]:
    """Context manager that holds the Lease of the pipeline `name`. Raises DeployInProgress if another deployment holds it.

    If Leases are not permitted, `say` reports that, and the deployment goes on without one. duration_seconds: time after the
    last renewal at which others may take the Lease over.
    """
    ref = lease_ref(namespace, name)
    try:
        lease = _acquire(cluster, ref, name, say, duration_seconds)
    except NotPermitted as error:
        say(f"other deployments are not locked out: {error}")
        lease = None
    with DeployLease(cluster, ref, lease, duration_seconds) as held:
        yield held


def _acquire(cluster: Cluster, ref: Ref, name: str, say: Callable[[str], None], duration_seconds: float) -> KubernetesObject:
    now = datetime.now(UTC)
    spec = {
        "holderIdentity": _identity(),
        "leaseDurationSeconds": max(1, round(duration_seconds)),
        "acquireTime": now.strftime(_FORMAT),
        "renewTime": now.strftime(_FORMAT),
    }
    own = {INSTANCE: name, MANAGED_BY: "lamina"}
    lease = kubernetes_object(_COORDINATION, "Lease", ref.name, ref.namespace, own, spec=spec)
    created = cluster.create(lease)
    if created is not None:
        return created
    live = cluster.get(ref)
    if live is None:
        return _acquire(cluster, ref, name, say, duration_seconds)  # the Lease was deleted between the two requests
    left_seconds = (_expires(live) - now).total_seconds()
    if left_seconds > 0:
        raise DeployInProgress(
            f"{holder(live)} changes {name} in namespace {ref.namespace}; wait for its end. If it died: a deployment "
            f"can take over {ref} in {left_seconds:.0f} s"
        )
    version = live["metadata"]["resourceVersion"]
    taken = cluster.replace({**lease, "metadata": {**lease["metadata"], "resourceVersion": version}})
    if taken is None:
        raise DeployInProgress(f"another deployment took over {ref} at the same moment; wait for its end")
    say(f"took over {ref}, which {holder(live)} did not renew in time")
    return taken


def _expires(lease: KubernetesObject) -> datetime:
    spec = lease["spec"]
    renewed = spec.get("renewTime") or spec.get("acquireTime")
    if not renewed:
        return datetime.fromtimestamp(0, UTC)
    return datetime.fromisoformat(renewed) + timedelta(seconds=spec.get("leaseDurationSeconds") or DURATION_SECONDS)


def _identity() -> str:
    """Name of this process as holder of a Lease: user@host/process id."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}/{os.getpid()}"
