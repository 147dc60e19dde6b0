"""An objective in a spec: what follows from it, what stays as it was written, and what is refused."""

from typing import Any

import msgspec
import pytest
from prometheus_client import start_http_server

from bench.pipeline import local_spec
from eventing.problems import InvalidRequest, PipelineUnavailable
from functions.configuration.objective import Objective
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.scheduling.batching import IN_FLIGHT_PER_INSTANCE
from knative.commands.local_pods import objective_line
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import gateway_service, stage_service
from knative.spec.errors import SpecError
from knative.spec.pipeline_spec import PipelineSpec

GIVEN = {"first_token_seconds": 2, "token_seconds": 0.2}
PASSES = {1: 0.016, 16: 0.02, 32: 0.03}


def spec(objective: dict[str, Any], **fields: Any) -> PipelineSpec:
    return local_spec("chat", model={"name": "tiny"}, objective=objective, **({"cut": "0:1,1:2,2:3,3:4"} | fields))


def test_settings_follow_from_the_objective_and_measured_passes() -> None:
    """A token may take 0.2 / 1.5 s on average; four passes of 16 rows take 0.08 of it, so 1.67 events may be at a pod."""
    found = spec(GIVEN | {"pass_seconds": PASSES})
    scaling = found.stage.autoscaling
    assert (scaling.target, scaling.window_seconds, scaling.container_concurrency) == (2.38, 10, 8)
    assert (scaling.scale_down_delay_seconds, found.stage.timeout_seconds) == (0, 5)
    assert found.gateway.micro_batch_sequences == 16
    assert spec({"first_token_seconds": 6, "token_seconds": 2, "pass_seconds": PASSES}).stage.autoscaling.window_seconds == 30
    assert spec(GIVEN | {"first_token_seconds": 6}).stage.timeout_seconds == 15
    assert spec(GIVEN | {"first_token_seconds": 1}).stage.timeout_seconds == 5, "requests that a stage holds take 2 s"


def test_requests_held_for_prompts_that_wait_exceed_the_target_however_quick_passes_are() -> None:
    """Beside one event at each pod. Micro-batches alone need not exceed it: two at a pod keep the objective for tokens."""
    quick = spec(GIVEN | {"pass_seconds": {1: 0.001}}).stage.autoscaling
    assert 2 < quick.target_concurrency < IN_FLIGHT_PER_INSTANCE + 1
    slower = spec(GIVEN | {"pass_seconds": {1: 0.017}}).stage.autoscaling
    assert slower.target_concurrency * 4 * 0.017 == pytest.approx(0.2 / 1.5, rel=0.01), "two would take longer than the mean"


def test_a_pod_that_saves_its_kv_is_drained_as_long_as_that_takes() -> None:
    assert spec(GIVEN, kv_store={"secret": "kv"}).stage.timeout_seconds == 600


def test_without_measured_passes_only_times_follow() -> None:
    found = spec(GIVEN | {"first_token_seconds": 4})
    assert (found.stage.autoscaling.target, found.stage.autoscaling.window_seconds) == (None, 20)
    assert found.gateway.micro_batch_sequences is None


def test_what_is_written_stays() -> None:
    stage = {"autoscaling": {"target": 3, "window_seconds": 12, "scale_down_delay_seconds": 7}, "timeout_seconds": 90}
    found = spec(GIVEN | {"pass_seconds": PASSES}, stage=stage, gateway={"micro_batch_sequences": 5}, cut=None, stages=4)
    assert (found.stage.autoscaling.target, found.stage.autoscaling.window_seconds) == (3, 12)
    assert (found.stage.autoscaling.scale_down_delay_seconds, found.stage.timeout_seconds) == (7, 90)
    assert (found.stage.autoscaling.container_concurrency, found.gateway.micro_batch_sequences) == (8, 5)
    assert stage["timeout_seconds"] == 90


@pytest.mark.parametrize(
    ("objective", "error"),
    [
        ({"first_token_seconds": 2}, r"\$\.objective: it lacks `token_seconds`"),
        (GIVEN | {"share": 95}, r"\$\.objective\.share: expected a number, above 0 and below 1, seen 95"),
        (GIVEN | {"token_seconds": 0.05, "pass_seconds": PASSES}, r"4 stages take 0\.064 s alone.* or allow 0\.096 s"),
        (GIVEN | {"pass_seconds": {4: 0.02}}, "begins with 4 rows; give the seconds of 1 row, too"),
        (GIVEN | {"pass_seconds": {1: 0.02, 2: 0.01}}, "2 rows take 0.01 s, less than 1 rows with 0.02 s"),
    ],
)
def test_what_cannot_be_is_refused(objective: dict[str, Any], error: str) -> None:
    with pytest.raises(SpecError, match=error):
        spec(objective)


def test_the_gateway_gets_the_objective_and_stages_the_settings() -> None:
    pipeline = ResolvedPipeline(spec(GIVEN | {"pass_seconds": PASSES}), ((0, 1), (1, 2), (2, 3), (3, 4)), "0" * 64)
    env = gateway_service(pipeline)["spec"]["template"]["spec"]["containers"][0]["env"]
    (value,) = (each["value"] for each in env if each["name"] == "LAMINA_OBJECTIVE")
    assert msgspec.json.decode(value, type=Objective) == Objective(first_token_seconds=2, token_seconds=0.2, share=0.95)
    annotations = stage_service(pipeline, 0)["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/target"] == "2.38"


def test_status_says_whether_the_objective_is_kept() -> None:
    metrics = GatewayMetrics()
    server, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    pods = [{"metrics_port": server.server_port}]
    try:
        assert objective_line(pods) is None
        metrics.aim(Objective(first_token_seconds=2, token_seconds=0.2, share=0.5))
        assert objective_line(pods) == "objective: no answer yet; 0.5 of them shall be within"
        metrics.judge(None, "stop", 1.9, 1.9 + 10 * 0.19, 11)
        metrics.judge(None, "length", 1.9, 1.9, 1)
        metrics.judge(None, "cancelled", 9.0, 9.0, 1)  # not counted, as the next one
        metrics.judge(InvalidRequest("too long"), "invalid-request", 0.0, 0.0, 0)
        assert objective_line(pods) == "objective: 1 of 2 answers within, 0.5 wanted: kept"
        metrics.judge(None, "stop", 2.1, 2.2, 2)
        metrics.judge(None, "stop", 1.0, 1.0 + 10 * 0.21, 11)
        metrics.judge(PipelineUnavailable("stage 1 is gone"), "pipeline-unavailable", 0.0, 0.0, 0)
        assert objective_line(pods) == "objective: 0.4 of 5 answers within, 0.5 wanted: missed"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
