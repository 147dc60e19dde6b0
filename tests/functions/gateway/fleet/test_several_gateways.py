"""Two gateways of a fleet agree by one Lease of a cluster which members have devices, also when one of them dies."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import msgspec
import pytest

from eventing.problems import NotReady, QueueFull
from functions.configuration.config import GatewayConfig
from functions.gateway.fleet import grants
from functions.gateway.fleet.grant_record import RECORD, Change, GrantRecord, LeaseRecord
from functions.gateway.fleet.grants import Grants, MemberPods
from functions.gateway.fleet.members import Version
from functions.gateway.stages.kubernetes_api import LEASES, KubernetesAPI
from tests.support.environments import gateway_config
from tests.support.functions.functions import wait_until
from tests.support.knative.kubernetes_api import KubernetesApi

LEASE = "models-grants"


class Cluster:
    """Pods that come as soon as a member has a grant, and stay until a test removes them."""

    def __init__(self, api: KubernetesApi) -> None:
        self.api = api
        self.versions = [Version(name, name, None, {}, _one_stage(name)) for name in ("chat", "code", "draw")]
        self.pods = dict.fromkeys((each.devices_key for each in self.versions), 0)
        self.asked: list[str] = []  # whose pods gateways have looked for
        api.put({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": LEASE, "namespace": "default"}})

    @contextmanager
    def gateway(self, name: str, max_devices: int = 1) -> Iterator[Grants]:
        record = LeaseRecord(KubernetesAPI(self.api.url, "default", LEASES), LEASE, name)
        found = Grants(max_devices, lambda: [each.services for each in self.versions], self._pods, record, name)
        found.thread.start()
        try:
            yield found
        finally:
            found.stop()

    def serve(self, gateway: Grants, version: Version, seconds: float = 30.0) -> None:
        """Lets one request in, whose pod is there at once."""
        gateway.enter(version, seconds)
        self.pods[version.devices_key] = 1

    @property
    def record(self) -> GrantRecord:
        lease = self.api.objects["coordination.k8s.io/v1", "leases", "default", LEASE]
        return msgspec.json.decode(lease["metadata"]["annotations"][RECORD], type=GrantRecord)

    @property
    def granted(self) -> set[str]:
        return set(self.record.grants)

    def _pods(self, services: Sequence[str]) -> MemberPods:
        key = ",".join(services)
        self.asked.append(key)
        count = self.pods[key]
        return MemberPods(count, ready=count > 0)


def _one_stage(name: str) -> GatewayConfig:
    return gateway_config(LAMINA_CUT="0:4", LAMINA_STAGES=f"0:4=http://{name}-s0", LAMINA_QUEUE_LIMIT="2")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    api = KubernetesApi()
    yield Cluster(api)
    api.close()


def test_two_gateways_never_grant_more_than_the_devices(cluster: Cluster) -> None:
    chat, code, draw = cluster.versions
    with cluster.gateway("one") as one, cluster.gateway("other") as other, ThreadPoolExecutor(2) as executor:
        cluster.serve(one, chat)
        cluster.serve(other, chat)  # the same member has its device already
        waiting = executor.submit(cluster.serve, other, code)
        with pytest.raises(NotReady, match="no device became free for member draw"):
            one.enter(draw, 1.0)
        one.leave(chat)
        with pytest.raises(NotReady):
            other.enter(draw, 1.5)
        assert not waiting.done(), "the other gateway still has a request of chat in flight"
        other.leave(chat)
        wait_until(lambda: cluster.granted == set())
        assert not waiting.done(), "its pod is there"
        cluster.pods[chat.devices_key] = 0
        waiting.result(30)
        assert cluster.granted == {code.devices_key}


def test_requests_that_wait_for_a_device_are_bounded_and_end_with_their_clients(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold threads that all members share, and would wake a member for nobody. They ask the API once a tick."""
    chat, code, _ = cluster.versions
    left, asked, update = threading.Event(), list[float](), LeaseRecord.update

    def noted(record: LeaseRecord, change: Change) -> None:
        asked.append(time.monotonic())
        update(record, change)

    monkeypatch.setattr(LeaseRecord, "update", noted)
    with cluster.gateway("one") as one, ThreadPoolExecutor(2) as executor:
        cluster.serve(one, chat)
        waiting = [executor.submit(one.enter, code, 600.0, left.is_set) for _ in range(2)]
        wait_until(lambda: one.waits().get(code.devices_key, (0, 0.0))[0] == 2)
        with pytest.raises(QueueFull, match="2 requests of member code wait for a device"):
            one.enter(code, 600.0)
        begun = len(asked)
        wait_until(lambda: len(asked) > begun + 5)
        assert asked[begun + 5] - asked[begun + 1] > 3.5 * LeaseRecord.tick_seconds
        left.set()
        for each in waiting:
            with pytest.raises(NotReady, match="the client has left"):
                each.result(60)
        assert one.waits() == {}
        cluster.serve(one, chat)  # it never had to give way


def test_a_gateway_that_dies_gives_its_grants_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "DEAD_SECONDS", 2.0)
    chat, code, _ = cluster.versions
    with ExitStack() as dying, cluster.gateway("one") as one:
        other = dying.enter_context(cluster.gateway("other"))
        cluster.serve(other, chat)
        dying.close()  # in the middle of a request
        with ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(cluster.serve, one, code, 60.0)
            wait_until(lambda: chat.devices_key not in cluster.granted)
            assert not waiting.done(), "its pod is there"
            cluster.pods[chat.devices_key] = 0
            waiting.result(60)


def test_a_member_that_was_removed_counts_until_its_pods_are_gone(cluster: Cluster) -> None:
    chat, code, _ = cluster.versions
    with cluster.gateway("one") as one, ThreadPoolExecutor(1) as executor:
        cluster.serve(one, chat)
        one.leave(chat)
        cluster.versions.remove(chat)
        waiting = executor.submit(cluster.serve, one, code)
        with pytest.raises(NotReady):
            one.enter(code, 1.0)
        assert not waiting.done()
        cluster.pods[chat.devices_key] = 0
        waiting.result(30)


def test_a_member_that_is_gone_leaves_nothing_in_the_record(cluster: Cluster) -> None:
    """Each deployment of a member has a key of its own, and the annotation of a Lease has an end."""
    chat, code, _ = cluster.versions
    with cluster.gateway("one") as one:
        cluster.serve(one, chat)
        wait_until(lambda: chat.devices_key in cluster.record.return_seconds)  # it was measured
        one.leave(chat)
        cluster.versions.remove(chat)
        cluster.pods[chat.devices_key] = 0
        cluster.serve(one, code)
        wait_until(lambda: code.devices_key in cluster.record.return_seconds)
        assert list(cluster.record.return_seconds) == [code.devices_key]
        cluster.asked.clear()
        wait_until(lambda: code.devices_key in cluster.asked)
        assert chat.devices_key not in cluster.asked, "its pods are looked for although nobody has it"
        one.leave(code)


def test_without_the_lease_nobody_is_let_in_and_it_is_said_why(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.api.finish_deletion(("coordination.k8s.io/v1", "leases", "default", LEASE))
    with cluster.gateway("one") as one, pytest.raises(NotReady):
        one.enter(cluster.versions[0], 1.0)
    assert "could not be agreed on, trying again: the Kubernetes API answered 404" in caplog.text
