"""What API servers enforce: rendered objects fit the CRDs of Serving and Eventing and Kubernetes' own kinds, and pods the
standard "restricted"."""

import copy
import importlib
import warnings
from typing import Any, Final

import pytest

from knative.render.gitops import for_gitops
from knative.render.rendering import checked, render
from knative.webhook.check import is_knative_service
from tests.support.knative.crds import KINDS, kind_of, schema_violations
from tests.support.knative.manifests import OTHER_DIGEST, resolved_pipeline
from tests.support.knative.pod_security import restricted_violations

_PLACEMENT: Final = {
    "node_selector": {"pool": "models"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topology_spread_constraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priority_class": "serving",
    "runtime_class": "nvidia",
    "image_pull_secrets": ["registry"],
    "labels": {"cost-center": "42"},
    "annotations": {"sidecar.example.com/inject": "false"},
    "env": {"HTTPS_PROXY": "http://proxy.example:3128"},
}
# Published models of the other kinds, generated from the projects' API definitions.
_MODULES: Final = {
    "v1": "kubernetes.core.v1",
    "rbac.authorization.k8s.io/v1": "kubernetes.rbac.v1",
    "policy/v1": "kubernetes.policy.v1",
    "networking.k8s.io/v1": "kubernetes.networking.v1",
    "batch/v1": "kubernetes.batch.v1",
    "monitoring.coreos.com/v1": "prometheus_operator.v1",
}
_SINK: Final = "https://answers.example/x"
PIPELINES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "hpa": {"stage": {"autoscaling": {"class": "hpa", "min_scale": 1}}},
    "placed": {"stage": {"pod": _PLACEMENT, "resources": {"gpu": 1}}, "gateway": {"pod": _PLACEMENT, "max_unavailable": 1}},
    "secrets": {
        "gateway": {"api_keys_secret": ["keys", "more-keys"], "limits_secret": "redis"},
        "kv_store": {"secret": "chat-kv"},
        "network": {"tls": {"secret": "chat-tls", "ca_config_map": "trust"}},
        "stage": {"weights_cache": "/cache"},
    },
    "knative's TLS": {"network": {"tls": {}}},
    "monitoring": {"monitoring": {"labels": {"release": "prometheus"}, "queue_proxy_metrics": True}},
    "without keys": {"store": {"endpoint": "http://store.example:9000", "secret": None, "web_identity": {"role_arn": "x"}}},
    "eventing": {
        "eventing": {
            "dead_letter_sink": "dead-letters",
            "reply_sink": _SINK,
            "channel": {"api_version": "messaging.knative.dev/v1beta1", "kind": "KafkaChannel"},
        },
        "tracing": {"endpoint": "http://collector.example:4318"},
    },
    "eventing to Services": {"eventing": {"dead_letter_sink": _SINK, "reply_sink": "answers", "backoff_policy": "linear"}},
}
# What Knative adds to every pod: queueSecurityContext and userLifecycle in knative/serving, queue.go and deploy.go of
# pkg/reconciler/revision/resources.
_QUEUE_PROXY: Final = {
    "name": "queue-proxy",
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
_LIFECYCLE: Final = {"preStop": {"httpGet": {"port": 8022, "path": "/wait-for-drain"}}}


def rendered(name: str) -> list[dict[str, Any]]:
    """All objects of a pipeline, as a GitOps controller gets them."""
    pipeline = checked(resolved_pipeline(OTHER_DIGEST, **PIPELINES[name]))
    return [each for objects in for_gitops(pipeline, render(pipeline)).values() for each in objects]


@pytest.mark.parametrize("name", PIPELINES)
def test_objects_fit_the_published_schemas(name: str) -> None:
    found = [each for each in rendered(name) if kind_of(each) in KINDS]
    assert len(found) >= 4
    assert {each["metadata"]["name"]: schema_violations(each) for each in found if schema_violations(each)} == {}


def understood(manifest: dict[str, Any]) -> Any:
    """The manifest as its model has read it: without fields that the model does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the models about their own fields
        module = importlib.import_module(f"cloudcoil.models.{_MODULES[manifest['apiVersion']]}")
    model = getattr(module, manifest["kind"]).model_validate(manifest)
    return model.model_dump(by_alias=True, exclude_unset=True, mode="json")


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_no_field_of_another_object_is_unknown(name: str) -> None:
    found = [each for each in rendered(name) if kind_of(each) not in KINDS]
    assert {each["kind"] for each in found} >= {"ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "Job"}
    for each in found:
        assert understood(each) == each


@pytest.mark.slow
def test_a_misspelt_field_of_another_object_would_be_found() -> None:
    policy = next(each for each in rendered("plain") if each["kind"] == "NetworkPolicy")
    policy["spec"]["ingres"] = []
    assert understood(policy) != policy


def test_every_published_kind_is_rendered() -> None:
    kinds = {kind_of(each) for name in PIPELINES for each in rendered(name)}
    assert kinds >= KINDS
    assert {kind.rpartition(" ")[0] for kind in kinds - KINDS} == _MODULES.keys()


def service() -> dict[str, Any]:
    return copy.deepcopy(next(filter(is_knative_service, rendered("plain"))))


@pytest.mark.parametrize(
    ("field", "value", "violation"),
    [
        ("contianers", [], "Additional properties are not allowed ('contianers' was unexpected)"),
        ("timeoutSeconds", "600", "$.spec.template.spec.timeoutSeconds: '600' is not of type 'integer'"),
        ("containerConcurrency", 2**70, "is greater than the maximum"),
        ("containers", [{"image": "x", "env": [{"name": "A"}, {"name": "A"}]}], "$.spec.template.spec.containers[0].env: A is"),
        ("volumes", [{"secret": {"secretName": "x"}}], "'name' is a required property"),
    ],
)
def test_a_wrong_field_would_be_found(field: str, value: object, violation: str) -> None:
    wrong = service()
    wrong["spec"]["template"]["spec"][field] = value
    assert violation in "; ".join(schema_violations(wrong))


def pods(name: str) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The pods that Knative and Kubernetes would make of a pipeline, each with its annotations."""
    found = []
    for each in rendered(name):
        if is_knative_service(each):
            template = copy.deepcopy(each["spec"]["template"])
            template["spec"]["containers"][0]["lifecycle"] = _LIFECYCLE
            template["spec"]["containers"].append(_QUEUE_PROXY)
        elif each["kind"] == "Job":
            template = each["spec"]["template"]
        else:
            continue
        found.append((template["spec"], template["metadata"].get("annotations") or {}))
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_pods_satisfy_the_standard_restricted(name: str) -> None:
    found = pods(name)
    assert len(found) >= 5, "three stages, a gateway, the Job that prunes"
    assert [restricted_violations(*each) for each in found] == [[]] * len(found)


@pytest.mark.parametrize(
    ("of_pod", "of_container", "control"),
    [
        ({"hostNetwork": True}, {}, "Host Namespaces"),
        ({"hostPID": True}, {}, "Host Namespaces"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, {}, "Volume Types"),
        ({"volumes": [{"name": "x", "image": {}}]}, {}, "Volume Types"),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax"}]}}, {}, "Sysctls"),
        ({"securityContext": {"runAsUser": 0}}, {}, "Non-root user"),
        ({"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}, {}, "SELinux"),
        ({"securityContext": {"windowsOptions": {"hostProcess": True}}}, {}, "HostProcess"),
        ({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}, {}, "AppArmor"),
        ({}, {"securityContext": {}}, "Running as Non-root"),
        ({}, {"securityContext": {}}, "Privilege Escalation"),
        ({}, {"securityContext": {}}, "Capabilities"),
        ({}, {"securityContext": {}}, "Seccomp"),
        ({}, {"securityContext": {"privileged": True}}, "Privileged Containers"),
        ({}, {"securityContext": {"procMount": "Unmasked"}}, "/proc"),
        ({}, {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "Seccomp"),
        ({}, {"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}}, "NET_ADMIN"),
        ({}, {"ports": [{"containerPort": 8080, "hostPort": 80}]}, "Host Ports"),
        ({}, {"livenessProbe": {"httpGet": {"host": "10.0.0.1"}}}, "Host Probes"),
        ({"initContainers": [{"name": "init"}]}, {}, "init"),
    ],
)
def test_each_control_would_be_found(of_pod: dict[str, Any], of_container: dict[str, Any], control: str) -> None:
    pod, _ = pods("plain")[0]
    assert any(
        control in line
        for line in restricted_violations({**pod, **of_pod, "containers": [pod["containers"][0] | of_container]})
    )
