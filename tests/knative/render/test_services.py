"""Services rendered from a PipelineSpec; functions/configuration/config.py itself reads their environment."""

from typing import Any

import pytest
import yaml

from eventing.wire.events import fingerprint_of
from functions.configuration.api_keys import Quota
from functions.configuration.config import GatewayConfig, StageConfig, read_config
from functions.configuration.pass_times import PassTimes
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import client_limits
from functions.gateway.scheduling.batching import SchedulerLimits
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import METRICS_PORT, services, stage_service
from knative.spec.cut import parse_cut
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import to_yaml
from knative.spec.pipeline_spec import quantity
from tests.support.knative.manifests import container_of, environment_of, resolved_pipeline

CUT = ((0, 10), (10, 20), (20, 30))
DIGEST = "sha256:0123"


IN_INT8 = {
    "namespace": "models",
    "model": {"name": "smollm2", "dtype": "int8"},
    "store": {"endpoint": "http://store.example:9000", "secret": "store-keys"},
}


def pipeline(**changes: Any) -> ResolvedPipeline:
    return resolved_pipeline(DIGEST, **(IN_INT8 | changes))


@pytest.mark.parametrize(("places", "awaiting"), [(0, 2), (8, 2), (4, 2), (3, 1), (2, 0), (1, 0)])
def test_requests_that_wait_for_memory_leave_places_to_those_that_compute(places: int, awaiting: int) -> None:
    """With a containerConcurrency of 2, waiting requests could fill the queue-proxy."""
    autoscaling = {"container_concurrency": places, "target": 1}
    config = read_config(environment_of(stage_service(pipeline(stage={"autoscaling": autoscaling}), 1)))
    assert isinstance(config, StageConfig)
    assert config.max_memory_waiters == awaiting


@pytest.mark.parametrize(("memory", "wanted"), [("512Mi", None), ("2Gi", str(256 * 2**20))])
def test_hidden_states_of_prompts_may_take_a_part_of_the_gateways_memory(memory: str, wanted: str | None) -> None:
    gateway = services(pipeline(gateway={"resources": {"memory": memory}}))[-1]
    assert environment_of(gateway).get("LAMINA_PROMPT_BYTES") == wanted
    config = read_config(environment_of(gateway))
    assert isinstance(config, GatewayConfig)
    assert config.prompt_bytes == int(wanted or SchedulerLimits().prompt_bytes)


def test_functions_accept_every_rendered_environment() -> None:
    everything = {
        "sleep_seconds": [0.03, 0.09, 0.03],
        "layer_group": "sleep",
        "max_merge": 2,
        "idle_sequence_seconds": 60,
        "weights_cache": "/cache",
        "threads": 1,
    }
    knobs = dict.fromkeys(("micro_batch_sequences", "chunk_tokens", "queue_limit"), 16)
    per_client = {
        "client_requests_per_minute": 60,
        "client_tokens_per_minute": 9000,
        "client_concurrent": 4,
        "client_tokens_per_day": 100_000,
        "client_tokens_per_month": 10**9,
        "client_max_tokens": 500,
        "limits_secret": "redis",
        "cors_origins": ["https://chat.example", "http://localhost:3000"],
        "hosts": ["chat.example", "*.corp.example"],
        "access_log": "prompts",
    }
    waits = dict.fromkeys(("cold_start_timeout_seconds", "request_timeout_seconds", "step_timeout_seconds"), 30.5)
    full = pipeline(
        stage=everything,
        gateway={**knobs, **waits, **per_client, "api_keys_secret": ["keys", "more-keys"], "proxies": 2, "jobs": "jobs"}
        | {"parse_control_tokens": True, "jobs_retention_seconds": 60},
    )
    for variant in (pipeline(), full):
        configs = [read_config(environment_of(service)) for service in services(variant)]
        assert [config.pipeline for config in configs] == [variant.fingerprint] * 4
        assert {(config.listen, config.metrics_port) for config in configs} == {("0.0.0.0", METRICS_PORT)}
        assert [config.layers for config in configs if isinstance(config, StageConfig)] == list(CUT)
    assert [config.sleep_seconds for config in configs if isinstance(config, StageConfig)] == [0.03, 0.09, 0.03]
    assert [config.parse_control_tokens for config in configs if isinstance(config, GatewayConfig)] == ["on"]
    gateway = configs[-1]
    assert isinstance(gateway, GatewayConfig)
    assert gateway.access_log == "prompts"
    assert client_limits(gateway, KeyRing()).quota("anybody") == Quota(60, 9000, 4, 500, None, 100_000, 10**9)
    assert gateway.cors_origins == ("https://chat.example", "http://localhost:3000")
    assert gateway.hosts == ("chat.example", "*.corp.example")
    assert gateway.stages[1] == ((10, 20), f"http://chat-{full.fingerprint[:8]}-s1.models.svc.cluster.local")
    assert gateway.api_keys is None
    pod = services(full)[-1]["spec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert gateway.api_key_files == (f"{mounted['api-keys-0']}/api-keys", f"{mounted['api-keys-1']}/api-keys")
    volumes = {volume["name"]: volume.get("secret") for volume in pod["volumes"]}
    items = [{"key": "api-keys", "path": "api-keys"}]
    assert volumes["api-keys-1"] == {"secretName": "more-keys", "items": items}
    assert (gateway.proxies, gateway.scores) == (2, "off")
    assert (gateway.jobs_store, gateway.jobs_retention_seconds) == ((gateway.store.bucket, "jobs"), 60)
    assert gateway.own_url == "http://chat.models.svc.cluster.local"


@pytest.mark.parametrize(("timeout", "drain"), [(600, 540), (300, 240), (90, 40), (60, 20), (30, 1)])
def test_a_gateway_ends_its_answers_before_it_is_killed(timeout: int, drain: float) -> None:
    """Its grace period is the revision's timeoutSeconds, of which queue-proxy's drain takes 30 s."""
    service = services(pipeline(gateway={"timeout_seconds": timeout, "request_timeout_seconds": min(timeout, 30)}))[-1]
    assert service["spec"]["template"]["spec"]["timeoutSeconds"] == timeout
    config = read_config(environment_of(service))
    assert isinstance(config, GatewayConfig)
    assert config.drain_seconds == drain


def test_each_stage_gets_the_kv_store_and_its_share_of_the_bytes() -> None:
    kept = {"secret": "chat-kv", "bucket": "talk", "max_bytes": "30Gi", "write_rate": "8Mi", "max_age_seconds": 3600}
    for index, (first, last) in enumerate(CUT):
        service, others = (stage_service(pipeline(kv_store=kept), index), stage_service(pipeline(), index))
        config = read_config(environment_of(service) | {"LAMINA_KV_KEY": "a" * 64})
        assert isinstance(config, StageConfig)
        own = config.kv_store
        assert (own.place, own.max_bytes) == (("talk", "kv"), int(30 * 2**30 * (last - first) / CUT[-1][1]))
        assert (own.max_age_seconds, own.bytes_per_second, own.key) == (3600, 8 * 2**20, b"\xaa" * 32)
        assert (own.access_key_id, own.secret_access_key) == ("secret", "secret")
        assert not [name for name in environment_of(others) if "KV_STORE" in name or name == "LAMINA_KV_KEY"]


def test_names_carry_the_fingerprint() -> None:
    expected = fingerprint_of([("int8", DIGEST)], CUT)
    names = [service["metadata"]["name"] for service in services(pipeline())]
    assert names == [*(f"chat-{expected[:8]}-s{k}" for k in range(3)), "chat"]


@pytest.mark.parametrize("field", ["wire_dtype", "kv_dtype"])
def test_a_dtype_of_hidden_states_or_kv_is_part_of_the_fingerprint_and_reaches_every_function(field: str) -> None:
    variant = pipeline(**{field: "int8"})
    told = {"wire_dtype": None, "kv_dtype": None, field: "int8"}
    assert variant.fingerprint == fingerprint_of([("int8", DIGEST)], CUT, **told)
    assert len({variant.fingerprint, pipeline().fingerprint, pipeline(wire_dtype="int8", kv_dtype="int8").fingerprint}) == 3
    configs = [read_config(environment_of(service)) for service in services(variant)]
    assert [(config.wire_dtype, config.kv_dtype, config.pipeline) for config in configs] == [
        (told["wire_dtype"], told["kv_dtype"], variant.fingerprint)
    ] * 4
    assert [read_config(environment_of(service)).kv_dtype for service in services(pipeline())] == [None] * 4


def test_stages_are_cluster_local_and_the_gateway_is_not() -> None:
    visible = [service["metadata"]["labels"].get("networking.knative.dev/visibility") for service in services(pipeline())]
    assert visible == ["cluster-local"] * 3 + [None]


def test_stages_mount_no_token_and_gateways_are_full_duplex() -> None:
    *stages, gateway = (service["spec"]["template"] for service in services(pipeline()))
    assert [stage["spec"]["automountServiceAccountToken"] for stage in stages] == [False] * 3
    assert gateway["metadata"]["annotations"]["features.knative.dev/http-full-duplex"] == "Enabled"


def test_queue_proxy_probes_without_a_period() -> None:
    """A period would turn off the probing every 50 ms: 0.4 to 0.9 s of every cold start on a cluster.

    With a startupProbe the activator would wait for the kubelet (pkg/activator/net/revision_backends.go).
    """
    variant = pipeline(eventing={"dead_letter_sink": "letters"})
    containers = [container_of(service) for service in services(variant)]
    assert [container["readinessProbe"] for container in containers] == [{"httpGet": {"path": "/readyz"}}] * 5
    assert not any("startupProbe" in container for container in containers)


def test_a_node_with_the_image_of_one_stage_needs_nothing_for_another_or_for_a_gateway() -> None:
    variant = pipeline(eventing={"dead_letter_sink": "letters"})
    assert len({container_of(service)["image"] for service in services(variant)}) == 1


def test_autoscaling_defaults_are_the_ones_that_worked_together() -> None:
    template = services(pipeline())[0]["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "autoscaling.knative.dev/class": "kpa.autoscaling.knative.dev",
        "autoscaling.knative.dev/metric": "concurrency",
        "autoscaling.knative.dev/target": "2",
        "autoscaling.knative.dev/target-utilization-percentage": "70",
        "autoscaling.knative.dev/window": "10s",
        "autoscaling.knative.dev/panic-window-percentage": "60",
        "autoscaling.knative.dev/scale-down-delay": "30s",
        "autoscaling.knative.dev/min-scale": "0",
        "autoscaling.knative.dev/max-scale": "10",
        "serving.knative.dev/progress-deadline": "600s",
    }
    assert template["spec"]["containerConcurrency"] == 8
    assert template["spec"]["timeoutSeconds"] == template["spec"]["responseStartTimeoutSeconds"] == 600


def test_hpa_scales_on_cpu() -> None:
    stage = {"autoscaling": {"class": "hpa", "min_scale": 1}}
    annotations = services(pipeline(stage=stage))[0]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/class"] == "hpa.autoscaling.knative.dev"
    assert annotations["autoscaling.knative.dev/metric"] == "cpu"
    assert annotations["autoscaling.knative.dev/target"] == "70"
    assert "autoscaling.knative.dev/window" not in annotations


def test_gateways_know_the_stages_targets_and_only_the_clients_gateway_has_a_page() -> None:
    overrides = [
        {"stage": 1, "autoscaling": {"target": 4, "target_utilization_percentage": 50}},
        {"stage": 2, "autoscaling": {"class": "hpa", "min_scale": 1}},
    ]
    *_, clients, events = services(pipeline(stage_overrides=overrides, eventing={"dead_letter_sink": "letters"}))
    configs = [read_config(environment_of(each)) for each in (clients, events)]
    assert [config.stage_targets for config in configs if isinstance(config, GatewayConfig)] == [(1.4, 2.0, 0.0)] * 2
    assert [config.page for config in configs if isinstance(config, GatewayConfig)] == ["on", "off"]
    without = services(pipeline(gateway={"page": "off"}))[-1]
    assert environment_of(without)["LAMINA_PAGE"] == "off"


def test_gpu_and_volumes() -> None:
    stage = {"resources": {"cpu": "4", "memory": "16Gi", "gpu": 1}, "weights_cache": "/var/cache/weights"}
    pod = services(pipeline(stage=stage))[0]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {
        "cpu": "4",
        "memory": "16Gi",
        "nvidia.com/gpu": "1",
        "ephemeral-storage": "3072Mi",
    }
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/tmp", "/var/cache/weights"}


def test_a_weights_cache_stays_below_the_limits_of_eviction() -> None:
    """The kubelet evicts a pod beyond the volume's limit, and first of all pods that use more than they requested."""
    stage = {"weights_cache": "/cache", "weights_cache_size": "8Gi"}
    pod = services(pipeline(stage=stage))[0]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    limit = next(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "weights-cache")
    asked = container["resources"]["requests"]["ephemeral-storage"]
    assert 0.9 * quantity(limit) <= int(env["LAMINA_WEIGHTS_CACHE_BYTES"]) <= 0.97 * quantity(limit)
    assert quantity(asked) == quantity(limit) + 2**30
    assert container["resources"]["limits"]["ephemeral-storage"] == asked
    plain = container_of(services(pipeline())[0])
    assert "ephemeral-storage" not in plain["resources"]["requests"]


def test_secrets_are_only_named() -> None:
    container = container_of(services(pipeline())[0])
    assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
    token = next(entry for entry in container["env"] if entry["name"] == "LAMINA_PIPELINE_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": "chat-pipeline", "key": "token"}}, "each pipeline has its own token"


def test_yaml_is_deterministic_and_reads_back() -> None:
    text = to_yaml(services(pipeline()))
    assert text == to_yaml(services(pipeline()))
    assert list(yaml.safe_load_all(text)) == services(pipeline())
    assert "&id" not in text


def test_a_label_that_looks_like_a_float_is_quoted() -> None:
    assert to_yaml([{"label": "1178e1174203"}]) == '---\nlabel: "1178e1174203"\n'


def test_a_list_of_sleep_seconds_needs_one_for_each_stage() -> None:
    with pytest.raises(SpecError, match=r"sleep_seconds: 2 given, none for stage 2"):
        services(pipeline(stage={"layer_group": "sleep", "sleep_seconds": [0.1, 0.2]}))


def test_only_the_layer_group_sleep_emulates_a_device() -> None:
    emulated = {"sleep_pass_times": [{"token_seconds": 0.5}, {}, {"stream_seconds": 1}], "sleep_bytes_per_second": 10**9}
    with pytest.raises(SpecError, match=r"sleep_pass_times: emulates a device, and \$\.stage\.layer_group is auto"):
        services(pipeline(stage=emulated))
    configs = [read_config(environment_of(each)) for each in services(pipeline(stage={**emulated, "layer_group": "sleep"}))]
    stages = [config for config in configs if isinstance(config, StageConfig)]
    assert [config.sleep_pass_times for config in stages] == [
        PassTimes(token_seconds=0.5),
        PassTimes(),
        PassTimes(stream_seconds=1),
    ]
    assert {config.sleep_bytes_per_second for config in stages} == {10**9}


def test_quantities_and_cuts() -> None:
    assert [quantity(text) for text in ("500m", "2", "1.5", "512Mi", "1k", "2G")] == [0.5, 2, 1.5, 2**29, 1000, 2e9]
    assert parse_cut("0:10,10:20,20:30") == CUT
