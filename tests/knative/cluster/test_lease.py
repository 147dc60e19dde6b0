"""Two deployments of one pipeline never run at the same time."""

import contextlib
import threading
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from knative.cluster.errors import ClusterError, DeployInProgress
from knative.cluster.lease import DeployLease, deploy_lease
from knative.cluster.status import status_lines
from tests.support.functions.functions import wait_until
from tests.support.knative.knative_controllers import never_ready
from tests.support.knative.manifests import objects, other, resource, stage_name
from tests.support.knative.site import Site

KEY = ("coordination.k8s.io/v1", "leases", "default", "chat-deploy")


def held(by: str, renewed_seconds_ago: float) -> dict[str, object]:
    then = (datetime.now(UTC) - timedelta(seconds=renewed_seconds_ago)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": by, "leaseDurationSeconds": 60, "acquireTime": "2026-01-01T00:00:00.000000Z", "renewTime": then}
    return resource("Lease", KEY[3], KEY[0], spec=spec)


def lost(lease: DeployLease) -> bool:
    try:
        lease.check()
    except DeployInProgress:
        return True
    return False


def test_a_second_deploy_is_told_who_holds_the_lease_and_since_when(site: Site) -> None:
    site.api.put(held("somebody@their-machine/7", 5))
    deployer = site.deployer
    on_chat = (deployer.delete, deployer.rollback, deployer.promote, deployer.abort, deployer.rotate_token)
    for act in (partial(deployer.deploy, objects()), *(partial(each, "chat") for each in on_chat)):
        with pytest.raises(DeployInProgress, match=r"somebody@their-machine/7 since 2026-01-01.*can take over .* in 5\d s"):
            act()
    assert site.api.applied == []


@pytest.mark.slow
def test_a_deployment_locks_out_others_of_the_same_pipeline(site: Site) -> None:
    rendered = objects()
    site.api.behaviours[stage_name(rendered, 0)] = never_ready
    first = site.deployer_for(3)

    def deploy() -> None:
        with contextlib.suppress(ClusterError):
            first.deploy(rendered)

    thread = threading.Thread(target=deploy)
    thread.start()
    wait_until(lambda: KEY in site.api.objects)
    with pytest.raises(DeployInProgress):
        site.deployer.deploy(other())
    site.deployer.deploy(objects(name="draft"))  # another pipeline is free
    assert any(line.startswith("being changed by ") for line in status_lines(site.status()))
    thread.join()
    assert KEY not in site.api.objects, "released, also after a failure"


def test_a_lease_that_was_not_renewed_is_taken_over(site: Site) -> None:
    site.api.put(held("somebody@a-laptop-that-was-shut/7", 61))
    site.deployer.deploy(objects())
    taken_over = "took over Lease default/chat-deploy, which somebody@a-laptop-that-was-shut/7"
    assert any(line.startswith(taken_over) for line in site.said)
    assert KEY not in site.api.objects


def test_the_lease_is_renewed_during_the_deployment(site: Site) -> None:
    with deploy_lease(site.cluster, "default", "chat", site.said.append, duration_seconds=1) as lease:
        first = site.api.objects[KEY]["spec"]["renewTime"]
        wait_until(lambda: site.api.objects[KEY]["spec"]["renewTime"] > first)
        lease.check()


def test_a_deployment_that_lost_its_lease_stops(site: Site) -> None:
    with deploy_lease(site.cluster, "default", "chat", site.said.append, duration_seconds=0.4) as lease:
        site.api.put(held("the-next@one/8", 0))
        wait_until(lambda: lost(lease))
        with pytest.raises(DeployInProgress, match="taken over by the-next@one/8"):
            lease.check()
    assert site.api.objects[KEY]["spec"]["holderIdentity"] == "the-next@one/8", "the lease is left to its holder"


def test_missing_rights_on_leases_are_reported(site: Site) -> None:
    site.api.forbidden.add(("create", "leases"))
    site.deployer.deploy(objects())
    assert any(line.startswith("other deployments are not locked out") for line in site.said)
