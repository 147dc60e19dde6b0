"""Two deployments of one pipeline never run at the same time."""

import contextlib
import threading
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError, DeployInProgress
from knative.cluster.lease import DeployLease, deploy_lease
from knative.cluster.status import cluster_status, status_lines
from tests.support.knative.deployments import objects, other, stage_name, until
from tests.support.knative.knative_controllers import never_ready
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.pipelines import rendered_pipeline

KEY = ("coordination.k8s.io/v1", "leases", "default", "chat-deploy")


def held(by: str, renewed_seconds_ago: float) -> dict[str, object]:
    then = (datetime.now(UTC) - timedelta(seconds=renewed_seconds_ago)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": by, "leaseDurationSeconds": 60, "acquireTime": "2026-01-01T00:00:00.000000Z", "renewTime": then}
    metadata = {"name": KEY[3], "namespace": "default"}
    return {"apiVersion": KEY[0], "kind": "Lease", "metadata": metadata, "spec": spec}


def lost(lease: DeployLease) -> bool:
    try:
        lease.check()
    except DeployInProgress:
        return True
    return False


def test_a_second_deploy_is_told_who_holds_the_lease_and_since_when(api: KubernetesApi, deployer: Deployer) -> None:
    api.put(held("somebody@their-machine/7", 5))
    on_chat = [partial(act, "chat") for act in (deployer.rollback, deployer.promote, deployer.abort, deployer.rotate_token)]
    for act in (partial(deployer.deploy, objects()), partial(deployer.delete, "chat"), *on_chat):
        with pytest.raises(DeployInProgress, match=r"somebody@their-machine/7 since 2026-01-01.*can take over .* in 5\d s"):
            act()
    assert api.applied == []


def test_a_deployment_locks_out_others_of_the_same_pipeline(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    rendered = objects()
    api.behaviours[stage_name(rendered, 0)] = never_ready
    first = Deployer(cluster, "default", said.append, timeout_seconds=3)

    def deploy() -> None:
        with contextlib.suppress(ClusterError):
            first.deploy(rendered)

    thread = threading.Thread(target=deploy)
    thread.start()
    until(lambda: KEY in api.objects)
    with pytest.raises(DeployInProgress):
        Deployer(cluster, "default", said.append).deploy(other())
    Deployer(cluster, "default", said.append).deploy(rendered_pipeline(name="draft"))  # another pipeline is free
    assert any(line.startswith("being changed by ") for line in status_lines(cluster_status(cluster, "default", "chat")))
    thread.join()
    assert KEY not in api.objects, "released, also after a failure"


def test_a_lease_that_was_not_renewed_is_taken_over(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    api.put(held("somebody@a-laptop-that-was-shut/7", 61))
    deployer.deploy(objects())
    assert any(line.startswith("took over Lease default/chat-deploy, which somebody@a-laptop-that-was-shut/7") for line in said)
    assert KEY not in api.objects


def test_the_lease_is_renewed_during_the_deployment(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    with deploy_lease(cluster, "default", "chat", said.append, duration_seconds=1) as lease:
        first = api.objects[KEY]["spec"]["renewTime"]
        until(lambda: api.objects[KEY]["spec"]["renewTime"] > first)
        lease.check()


def test_a_deployment_that_lost_its_lease_stops(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    with deploy_lease(cluster, "default", "chat", said.append, duration_seconds=0.4) as lease:
        api.put(held("the-next@one/8", 0))
        until(lambda: lost(lease))
        with pytest.raises(DeployInProgress, match="taken over by the-next@one/8"):
            lease.check()
    assert api.objects[KEY]["spec"]["holderIdentity"] == "the-next@one/8", "the lease is left to its holder"


def test_missing_rights_on_leases_are_reported(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    api.forbidden.add(("create", "leases"))
    deployer.deploy(objects())
    assert any(line.startswith("other deployments are not locked out") for line in said)
