"""The autoscaler's metrics: Knative's own names, and those of the load that a revision scales on."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from knative.local.admin import render_metrics
from tests.support.knative.platform import client, echo_service, fetch, running_platform

COMMON = {
    *("pods_desired", "pods_requested", "pods_count", "pods_not_ready_count", "pods_pending_count", "pods_terminating_count"),
    *("panic_mode", "capacity_excess"),
}  # as Prometheus writes `kn.revision.pods.desired` and the like


async def test_names_and_values(tmp_path: Path) -> None:
    by_rps = echo_service("rps", annotations={"metric": "rps", "target": "10"})
    async with running_platform(tmp_path, echo_service(), by_rps) as platform, client() as session:
        await fetch(session, platform.url("echo") + "/pid")
        seen: dict[str, dict[str, float]] = {"echo": {}, "rps": {}}
        for family in text_string_to_metric_families(render_metrics(platform.services.values()).decode()):
            for sample in family.samples:
                assert sample.labels["kn_revision_name"] == sample.labels["kn_service_name"] + "-00001"
                seen[sample.labels["kn_service_name"]][sample.name.removeprefix("kn_revision_")] = sample.value
        loads = ("stable", "panic", "target")
        assert seen["echo"].keys() == COMMON | {f"concurrency_{name}" for name in loads}
        assert seen["rps"].keys() == COMMON | {f"rps_{name}" for name in loads}
        assert (seen["echo"]["pods_count"], seen["rps"]["pods_count"]) == (1, 0)
        assert (seen["echo"]["concurrency_target"], seen["rps"]["rps_target"]) == (5.6, 7)
