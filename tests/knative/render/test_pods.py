"""Pod settings of a spec, as rendered and as Knative's webhook judges them."""

from typing import Any

import pytest

from functions.configuration.config import read_config
from knative.render.rendering import checked, resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.spec_file import spec_from_dict
from knative.webhook.check import missing_flags, validate
from knative.webhook.feature_flags import FeatureFlags
from storage.errors import ModelNotPublished
from tests.support.knative.manifests import document, environment_of, resolved_pipeline

TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SPREAD = {
    "maxSkew": 1,
    "topologyKey": "topology.kubernetes.io/zone",
    "whenUnsatisfiable": "ScheduleAnyway",
    "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": "chat"}},
}
TERM = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [TERM]}}}
EVERYTHING: dict[str, Any] = {
    "node_selector": {"pool": "models"},
    "tolerations": [TOLERATION],
    "affinity": AFFINITY,
    "topology_spread_constraints": [SPREAD],
    "priority_class": "serving",
    "runtime_class": "nvidia",
    "image_pull_secrets": ["registry"],
    "labels": {"cost-center": "42"},
    "annotations": {"sidecar.example.com/inject": "false"},
    "env": {"HTTPS_PROXY": "http://proxy.example:3128"},
}
FLAGS = {
    "kubernetes.podspec-nodeselector": "nodeSelector",
    "kubernetes.podspec-tolerations": "tolerations",
    "kubernetes.podspec-affinity": "affinity",
    "kubernetes.podspec-topologyspreadconstraints": "topologySpreadConstraints",
    "kubernetes.podspec-priorityclassname": "priorityClassName",
    "kubernetes.podspec-runtimeclassname": "runtimeClassName",
}


def template_of(service: KubernetesObject) -> dict[str, Any]:
    found: dict[str, Any] = service["spec"]["template"]
    return found


def rendered(**changes: Any) -> list[KubernetesObject]:
    return services(resolved_pipeline(**changes))


@pytest.mark.parametrize("component", ["stage", "gateway"])
def test_pod_settings_reach_only_their_component(component: str) -> None:
    variant = resolved_pipeline(**{component: {"pod": EVERYTHING}})
    *stages, gateway = services(variant)
    with_it, without = ([*stages], [gateway]) if component == "stage" else ([gateway], [*stages])
    for template in map(template_of, with_it):
        pod = template["spec"]
        assert pod["nodeSelector"] == {"pool": "models"}
        assert (pod["tolerations"], pod["affinity"], pod["topologySpreadConstraints"]) == ([TOLERATION], AFFINITY, [SPREAD])
        assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("serving", "nvidia")
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert template["metadata"]["labels"].items() >= {"cost-center": "42", "app.kubernetes.io/instance": "chat"}.items()
        assert template["metadata"]["annotations"]["sidecar.example.com/inject"] == "false"
        assert "autoscaling.knative.dev/target" in template["metadata"]["annotations"]
        assert {"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"} in pod["containers"][0]["env"]
    for template in map(template_of, without):
        assert not {"nodeSelector", "tolerations", "imagePullSecrets"} & template["spec"].keys()
        assert "cost-center" not in template["metadata"]["labels"]
    checked(variant)


def test_each_pod_field_needs_its_feature_flag() -> None:
    """Without these flags Knative refuses the Service, with them it accepts it."""
    stage, *_ = rendered(stage={"pod": EVERYTHING})
    assert {flag: field.rpartition(".")[2] for flag, field in missing_flags(stage).items()} == FLAGS
    assert validate(stage, features=FeatureFlags(dict.fromkeys(FLAGS, "enabled"))) == []
    lacking = FeatureFlags(dict.fromkeys(FLAGS.keys() - {"kubernetes.podspec-affinity"}, "allowed"))
    assert list(missing_flags(stage, lacking)) == ["kubernetes.podspec-affinity"]
    assert missing_flags(rendered()[0]) == {}


def test_stage_overrides_are_rendered() -> None:
    override = {
        "stage": 1,
        "device": "cuda",
        "resources": {"cpu": "4", "memory": "16Gi", "gpu": 1},
        "kv_cache": "6Gi",
        "autoscaling": {"max_scale": 2, "target": 4},
        "pod": {"node_selector": {"gpu": "a"}},
    }
    services_ = rendered(stage_overrides=[override])
    first, second, third, _ = map(template_of, services_)
    assert first["spec"]["containers"][0]["resources"] == third["spec"]["containers"][0]["resources"]
    assert second["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    env = environment_of(services_[1])
    assert (env["LAMINA_DEVICE"], env["LAMINA_KV_CACHE_BYTES"]) == ("cuda", str(6 * 2**30))
    scales = [each["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"] for each in (first, second, third)]
    assert scales == ["10", "2", "10"]
    assert second["metadata"]["annotations"]["autoscaling.knative.dev/target"] == "4"
    assert [each["spec"].get("nodeSelector") for each in (first, second, third)] == [None, {"gpu": "a"}, None]


def test_a_gateways_autoscaling_has_its_own_defaults() -> None:
    gateway = template_of(rendered(gateway={"autoscaling": {"min_scale": 1}})[-1])
    annotations = gateway["metadata"]["annotations"]
    wanted = {"min-scale": "1", "max-scale": "3", "target": "100"}
    assert {name: annotations[f"autoscaling.knative.dev/{name}"] for name in wanted} == wanted
    assert gateway["spec"]["containerConcurrency"] == 0


def test_without_keys_pods_authenticate_by_their_accounts() -> None:
    """Workload identity: no Secret is named, and stages still mount no token of the Kubernetes API."""
    keyless = {"endpoint": "https://s3.example.com", "secret": None}
    *stages, gateway = map(template_of, rendered(store=keyless, stage={"service_account": "chat-reader"}))
    for stage in stages:
        assert "envFrom" not in stage["spec"]["containers"][0]
        assert (stage["spec"]["serviceAccountName"], stage["spec"]["automountServiceAccountToken"]) == ("chat-reader", False)
    assert "envFrom" not in gateway["spec"]["containers"][0]
    assert gateway["spec"]["serviceAccountName"] == "chat-gateway"


def test_a_web_identity_token_is_mounted_and_read() -> None:
    identity = {"audience": "minio", "sts_endpoint": "http://minio.storage:9000"}
    store = {"endpoint": "http://minio.storage:9000", "secret": None, "web_identity": identity}
    variant = resolved_pipeline(store=store, stage={"service_account": "chat-reader"})
    for service in services(variant):
        pod = template_of(service)["spec"]
        token = {"audience": "minio", "expirationSeconds": 3600, "path": "token"}
        assert {"name": "store-token", "projected": {"sources": [{"serviceAccountToken": token}]}} in pod["volumes"]
        mount = {"name": "store-token", "mountPath": "/var/run/secrets/lamina/store", "readOnly": True}
        container = pod["containers"][0]
        assert mount in container["volumeMounts"]
        env = {each["name"]: each.get("value", "secret") for each in container["env"]} | {"PORT": "8080"}
        read = read_config(env).store
        assert (read.web_identity_token_file, read.sts_endpoint) == (
            "/var/run/secrets/lamina/store/token",
            "http://minio.storage:9000",
        )
        assert read.access_key_id is None
    checked(variant)
    with pytest.raises(SpecError, match=r"\$\.store\.web_identity: cannot be combined with keys"):
        spec_from_dict(document(store=store | {"secret": "lamina-store"}))


def test_functions_of_a_mixed_pipeline_know_all_weights() -> None:
    """The pipeline has another fingerprint than one with equal stages."""
    digests = {"int8": "b" * 64}
    alike = resolved_pipeline()
    spec = spec_from_dict(document(stage_overrides=[{"stage": 1, "dtype": "int8"}]))
    mixed = ResolvedPipeline(spec, alike.cut, alike.weights_digest, digests)
    assert mixed.fingerprint != alike.fingerprint
    environs = [environment_of(service) for service in services(mixed)]
    assert [environ["LAMINA_DTYPE"] for environ in environs] == ["bfloat16", "int8", "bfloat16", "bfloat16"]
    wanted = ",".join(f"{dtype}={digest}" for dtype, digest in mixed.weights)
    assert {environ["LAMINA_WEIGHTS"] for environ in environs} == {wanted}
    assert all("LAMINA_WEIGHTS" not in environment_of(service) for service in services(alike))


def test_a_pinned_spec_needs_a_digest_for_each_dtype() -> None:
    asked: list[str] = []

    def published(dtype: str) -> Any:
        asked.append(dtype)
        raise ModelNotPublished(dtype)

    overrides = [{"stage": 1, "dtype": "int8"}]
    model = {"name": "m", "dtype": "bfloat16", "digest": "a" * 64}
    cut = {"cut": "0:10,10:20,20:30", "stages": None, "stage_overrides": overrides}
    pinned = spec_from_dict(document(model={**model, "digests": {"int8": "b" * 64}}, **cut))
    assert resolve(pinned, published).weights[1] == ("int8", "b" * 64)
    with pytest.raises(ModelNotPublished):
        resolve(spec_from_dict(document(model=model, **cut)), published)
    assert asked == ["bfloat16"]
