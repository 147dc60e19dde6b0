"""The pod of a revision: what Knative's masks and the pod's own rules refuse, beyond the recorded cases."""

from typing import Any

import pytest

from knative.webhook.check import validate
from tests.support.knative.manifests import service

AT = "spec.template.spec"


def fields(spec: dict[str, Any] | None = None, container: dict[str, Any] | None = None) -> set[str]:
    return {violation.field for violation in validate(service(spec, container))}


@pytest.mark.parametrize(
    "spec",
    [
        {"hostNetwork": False},
        {"nodeSelector": {}},
        {"tolerations": []},
        {"priorityClassName": ""},
        {"automountServiceAccountToken": False},
        {"timeoutSeconds": 0, "containerConcurrency": 0},
    ],
)
def test_an_empty_value_is_no_value(spec: dict[str, Any]) -> None:
    assert fields(spec) == set()


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"affinity": {}}, "affinity"),
        ({"shareProcessNamespace": False}, "shareProcessNamespace"),
        ({"runtimeClassName": ""}, "runtimeClassName"),
        ({"automountServiceAccountToken": True}, "automountServiceAccountToken"),
        ({"hostAliases": [{"ip": "1.2.3.4"}]}, "hostAliases"),
        ({"timeoutSeconds": -1}, "timeoutSeconds"),
        ({"serviceAccountName": "No_Such"}, "serviceAccountName"),
        ({"containers": []}, "containers"),
        ({"containers": [{}]}, "containers[0].image"),
    ],
)
def test_pod_fields(spec: dict[str, Any], field: str) -> None:
    assert fields(spec) == {f"{AT}.{field}"}


@pytest.mark.parametrize(
    "container",
    [
        {"ports": [{"containerPort": 8080, "name": "http1", "protocol": "TCP"}]},
        {"env": [{"name": "A", "value": ""}, {"name": "B"}]},
        {"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k", "optional": True}}}]},
        {"envFrom": [{"secretRef": {"name": "s"}, "prefix": "P_"}]},
        {"readinessProbe": {}},
        {"readinessProbe": {"httpGet": {"path": "/readyz"}, "periodSeconds": 1}},
        {"readinessProbe": {"grpc": {"port": 9000}}},
        {"startupProbe": {"httpGet": {"path": "/", "port": "http"}}},
        {"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": 1, "memory": "1024Mi"}}},
        {"resources": {"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": "1"}}},
        {"image": "localhost:5000/a/b@sha256:" + "0" * 64},
        {"image": "dev.local/app"},
        {"securityContext": {"privileged": False, "capabilities": {"drop": ["ALL"], "add": []}}},
        {"terminationMessagePolicy": "FallbackToLogsOnError"},
        {"resources": {"limits": {"cpu": 0.5, "memory": 1e9}}},
        {"env": [{"name": "A", "value": None}], "args": [None], "ports": None, "resources": {"limits": {"cpu": None}}},
    ],
)
def test_accepted_containers(container: dict[str, Any]) -> None:
    assert fields(container=container) == set()


@pytest.mark.parametrize(
    ("container", "field"),
    [
        ({"ports": [{"containerPort": 70000}]}, "ports.containerPort"),
        ({"ports": [{"containerPort": 8080, "protocol": "UDP"}]}, "ports.protocol"),
        ({"env": [{"name": "A", "value": 1}]}, "env[0].value"),
        ({"env": [{"value": "1"}]}, "env[0].name"),
        ({"env": [{"name": ""}]}, "env[0].name"),
        ({"env": [{"name": "A=B"}]}, "env[0].name"),
        ({"env": [{"name": "A", "valueFrom": {}}]}, "env[0].valueFrom"),
        ({"env": [{"name": "A", "value": "1", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}, "env[0].valueFrom"),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}, "env[0].valueFrom.secretKeyRef.key"),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"key": "k"}}}]}, "env[0].valueFrom.secretKeyRef.name"),
        ({"env": {"A": "1"}}, "env"),
        ({"image": ""}, "image"),
        ({"image": "UPPER/case"}, "image"),
        ({"image": "a b"}, "image"),
        ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
        ({"name": "Not_A_Label"}, "name"),
        ({"command": "python"}, "command"),
        ({"readinessProbe": {"failureThreshold": 3}}, "readinessProbe.failureThreshold"),
        ({"readinessProbe": {"timeoutSeconds": 3}}, "readinessProbe.timeoutSeconds"),
        ({"readinessProbe": {"periodSeconds": -1}}, None),
        ({"livenessProbe": {"exec": {"command": ["x"]}, "successThreshold": 2}}, "livenessProbe.successThreshold"),
        ({"livenessProbe": {"exec": {}}}, "livenessProbe.exec.command"),
        ({"startupProbe": {"tcpSocket": {"port": "9000x"}}}, "startupProbe.tcpSocket.port"),
        ({"resources": {"limits": {"memory": "1 GB"}}}, "resources.limits.memory"),
        ({"resources": {"limits": {"memory": "1gb"}}}, "resources.limits.memory"),
        ({"resources": {"limits": {"cpu": "-1"}}}, "resources.limits[cpu]"),
        ({"resources": {"limits": {"gpu": "1"}}}, "resources.limits[gpu]"),
        ({"resources": {"limits": {"nvidia.com/gpu": "500m"}}}, "resources.limits[nvidia.com/gpu]"),
        ({"resources": {"requests": {"nvidia.com/gpu": "1"}}}, "resources.requests"),
        ({"resources": {"requests": {"memory": "1.1Gi"}, "limits": {"memory": "1Gi"}}}, "resources.requests"),
        ({"securityContext": {"runAsUser": -1}}, "securityContext.runAsUser"),
        ({"securityContext": {"seccompProfile": {"type": "Loose"}}}, "securityContext.seccompProfile.type"),
        ({"terminationMessagePolicy": "Never"}, "terminationMessagePolicy"),
        ({"livenesProbe": {}}, "livenesProbe"),
    ],
)
def test_refused_containers(container: dict[str, Any], field: str | None) -> None:
    found = fields(container=container)
    short = {name.removeprefix(f"{AT}.containers[0].").removeprefix("spec.containers[0].") for name in found}
    assert found
    assert field is None or short == {field}


def test_exactly_one_field_of_a_group() -> None:
    none = fields(container={"livenessProbe": {"periodSeconds": 5}})
    assert none == {f"{AT}.containers[0].livenessProbe.{name}" for name in ("httpGet", "tcpSocket", "exec", "grpc")}
    both = fields(container={"envFrom": [{"secretRef": {"name": "s"}, "configMapRef": {"name": "m"}}, {"secretRef": {}}]})
    assert both == {f"{AT}.containers[0].envFrom[0].{name}" for name in ("secretRef", "configMapRef")}


MOUNT = {"name": "x", "mountPath": "/x"}


@pytest.mark.parametrize(
    "volume",
    [
        {"configMap": {"name": "m", "items": [{"key": "a", "path": "b"}]}},
        {"secret": {"secretName": "s", "defaultMode": 0o400}},
        {"projected": {"sources": [{"secret": {"name": "s"}}, {"serviceAccountToken": {"path": "t"}}]}},
        {"projected": {"sources": [{"downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "metadata.name"}}]}}]}},
        {"emptyDir": {"medium": "Memory", "sizeLimit": "1.5Gi"}},
    ],
)
def test_accepted_volumes(volume: dict[str, Any]) -> None:
    assert fields({"volumes": [{"name": "x", **volume}]}, {"volumeMounts": [MOUNT]}) == set()


@pytest.mark.parametrize(
    ("volume", "field"),
    [
        ({}, "secret"),
        ({"emptyDir": {}, "secret": {"secretName": "s"}}, "emptyDir"),
        ({"emptyDir": {"medim": "Memory"}}, "emptyDir.medim"),
        ({"emptyDir": {"sizeLimit": "-1"}}, "emptyDir.sizeLimit"),
        ({"emptyDir": None}, "emptyDir"),
        ({"secret": {"secretName": None}}, "secret.secretName"),
        ({"secret": {}}, "secret.secretName"),
        ({"secret": {"secretName": "s", "defaultMode": 777}}, "secret.defaultMode"),
        ({"configMap": {"name": "m", "items": [{"key": "a", "path": ""}]}}, "items[0].path"),
        ({"configMap": {"name": "m", "items": [{"key": "a", "path": "../b"}]}}, "configMap.items[0].path"),
        ({"projected": {"sources": [{}]}}, "projected[0].secret"),
        ({"projected": {"sources": [{"secret": {}}]}}, "projected[0].secret.name"),
        ({"nfs": {"server": "s"}}, "nfs"),
    ],
)
def test_refused_volumes(volume: dict[str, Any], field: str) -> None:
    found = fields({"volumes": [{"name": "x", **volume}]}, {"volumeMounts": [MOUNT]})
    assert any(name.endswith(f"volumes[0].{field}") for name in found), found


@pytest.mark.parametrize(
    ("mounts", "field"),
    [
        ([{"name": "y", "mountPath": "/y"}, MOUNT], "volumeMounts[0].name"),
        ([{"name": "x", "mountPath": "x"}], "volumeMounts[0].mountPath"),
        ([{"name": "x", "mountPath": ""}], "volumeMounts[0].mountPath"),
        ([{"name": "x", "mountPath": "/dev/"}], "volumeMounts[0].mountPath"),
        ([{"name": "x", "mountPath": "//"}], "volumeMounts[0].mountPath"),
        ([MOUNT, {"name": "x", "mountPath": "/x/"}], "volumeMounts[1].mountPath"),
        ([{"name": "x", "mountPath": "/a:b"}], "volumeMounts[0].mountPath"),
        ([{"name": "x", "mountPath": "/x", "subPath": "../up"}], "volumeMounts[0].subPath"),
        ([{"name": "x"}], "volumeMounts[0].mountPath"),
    ],
)
def test_mounts(mounts: list[dict[str, Any]], field: str) -> None:
    found = fields({"volumes": [{"name": "x", "emptyDir": {}}]}, {"volumeMounts": mounts})
    assert {name.partition("containers[0].")[2] for name in found} == {field}


def test_containers_share_one_port_and_no_name() -> None:
    port = {"ports": [{"containerPort": 8080}]}
    image = {"image": "registry.example/app:v1"}
    assert fields({"containers": [image | port, image]}) == set()
    twice = {"containers": [image | port | {"name": "a"}, image | {"name": "a"}]}
    assert fields(twice) == {f"{AT}.containers[1].name"}
    assert fields({"containers": [image | port, image | {"env": [{"name": "PORT", "value": "1"}]}]}) == set()
    assert fields({"containers": [image | port, image | {"env": [{"name": "K_SERVICE", "value": "1"}]}]}) == {
        f"{AT}.containers[1].env[0].name"
    }
