"""What a cluster's feature flags let through, field by field, and how flags are read."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.commands.check import check
from knative.webhook.check import validate
from knative.webhook.feature_flags import POD_FIELDS, VOLUME_FIELDS, FeatureFlags, NoFeatures, read_features
from tests.support.knative.services import service

AT = "spec.template.spec"
POD: dict[str, Any] = {
    "affinity": {"nodeAffinity": {}},
    "dnsConfig": {"nameservers": ["192.0.2.1"]},
    "dnsPolicy": "None",
    "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a.example"]}],
    "hostIPC": True,
    "hostNetwork": True,
    "hostPID": True,
    "initContainers": [{"name": "first", "image": "registry.example/first:1"}],
    "nodeSelector": {"disk": "fast"},
    "priorityClassName": "high",
    "runtimeClassName": "gvisor",
    "schedulerName": "mine",
    "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
    "shareProcessNamespace": True,
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
}
VOLUMES: dict[str, Any] = {
    "persistentVolumeClaim": {"claimName": "data"},
    "image": {"reference": "registry.example/files:1"},
    "hostPath": {"path": "/data"},
    "csi": {"driver": "csi.example"},
    "ephemeral": {"volumeClaimTemplate": {}},
}
CONTAINER: dict[str, tuple[str, dict[str, Any]]] = {
    "kubernetes.podspec-fieldref": (
        "env[0].valueFrom.fieldRef",
        {"env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]},
    ),
    "kubernetes.containerspec-addcapabilities": (
        "securityContext.capabilities.add",
        {"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}},
    ),
}


def refused(manifest: dict[str, Any], **flags: str) -> dict[str, str]:
    """Field → reasons."""
    found: dict[str, str] = {}
    for each in validate(manifest, features=FeatureFlags(flags)):
        found[each.field] = f"{found[each.field]}; {each.reason}" if each.field in found else each.reason
    return found


def on(flag: str, value: str = "Enabled") -> dict[str, str]:
    return {flag: value}


def test_every_field_behind_a_flag_is_tried_here() -> None:
    assert POD.keys() == POD_FIELDS.keys()
    assert VOLUMES.keys() | {"emptyDir"} == VOLUME_FIELDS.keys()


@pytest.mark.parametrize("name", POD)
@pytest.mark.parametrize("value", ["Enabled", "allowed"])
def test_a_field_of_the_pod_passes_only_with_its_flag(name: str, value: str) -> None:
    manifest, flag = service({name: POD[name]}), POD_FIELDS[name]
    reasons = refused(manifest)
    assert flag in reasons[f"{AT}.{name}"]
    assert refused(manifest, **on(flag, value)) == {}
    others = {other: "Enabled" for other in POD_FIELDS.values() if other != flag}
    assert refused(manifest, **others).keys() >= {f"{AT}.{name}"}


@pytest.mark.parametrize("kind", VOLUMES)
def test_a_volume_passes_with_its_flag(kind: str) -> None:
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    manifest = service({"volumes": [{"name": "data", kind: VOLUMES[kind]}]}, mount)
    assert VOLUME_FIELDS[kind] in refused(manifest)[f"{AT}.volumes[0].{kind}"]
    assert refused(manifest, **on(VOLUME_FIELDS[kind])) == {}


def test_empty_dir_passes_unless_its_flag_is_off() -> None:
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    manifest = service({"volumes": [{"name": "data", "emptyDir": {}}]}, mount)
    assert refused(manifest) == {}
    assert refused(manifest, **on(VOLUME_FIELDS["emptyDir"], "Disabled")).keys() == {f"{AT}.volumes[0].emptyDir"}


@pytest.mark.parametrize("flag", CONTAINER)
def test_a_field_of_a_container_passes_with_its_flag(flag: str) -> None:
    field, fields = CONTAINER[flag]
    manifest = service(container=fields)
    assert flag in refused(manifest)[f"{AT}.containers[0].{field}"]
    assert refused(manifest, **on(flag)) == {}


def test_added_capabilities_need_enabled_not_allowed() -> None:
    manifest = service(container=CONTAINER["kubernetes.containerspec-addcapabilities"][1])
    assert refused(manifest, **on("kubernetes.containerspec-addcapabilities", "Allowed"))


@pytest.mark.parametrize("value", ["Enabled", "AllowRootBounded"])
def test_secure_pod_defaults_lets_a_pod_choose_its_seccomp_profile_alone(value: str) -> None:
    manifest = service({"securityContext": {"seccompProfile": {"type": "Unconfined"}}})
    assert refused(manifest, **on("secure-pod-defaults", value)) == {}
    more = service({"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, "runAsUser": 0}})
    assert refused(more, **on("secure-pod-defaults", value)).keys() == {f"{AT}.securityContext.runAsUser"}


def test_some_fields_of_a_pods_security_context_never_pass() -> None:
    manifest = service({"securityContext": {"sysctls": []}})
    flag = POD_FIELDS["securityContext"]
    assert refused(manifest, **on(flag)) == {f"{AT}.securityContext.sysctls": "must not set the field(s)"}


def test_an_init_container_has_no_probes() -> None:
    probed = POD["initContainers"][0] | {"readinessProbe": {"tcpSocket": {}}}
    found = refused(service({"initContainers": [probed]}), **on(POD_FIELDS["initContainers"]))
    assert found == {f"{AT}.initContainers[0].readinessProbe": "field not allowed in an init container"}


def test_sidecars_are_probed_with_their_flag() -> None:
    sidecar = {"name": "side", "image": "registry.example/side:1", "readinessProbe": {"httpGet": {"path": "/", "port": 9000}}}
    main = {"image": "registry.example/app:v1", "ports": [{"containerPort": 8080}]}
    manifest = service({"containers": [main, sidecar]})
    assert all("multi-container-probing" in reason for reason in refused(manifest).values())
    assert f"{AT}.containers[1].readinessProbe" in refused(manifest)
    assert refused(manifest, **on("multi-container-probing")) == {}


def test_unknown_flag_values_count_as_defaults() -> None:
    flags = FeatureFlags({"kubernetes.podspec-affinity": "yes", "kubernetes.podspec-volumes-emptydir": "off"})
    assert flags.value("kubernetes.podspec-affinity") == "Disabled"
    assert flags.value("kubernetes.podspec-volumes-emptydir") == "Enabled"


def config_features(**data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-features"}, "data": data}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "not 'NoneType'"),
        ({"kind": "Secret"}, "not 'Secret'"),
        ({"kind": "ConfigMap", "metadata": {"name": "config-network"}}, "not 'config-network'"),
        ({"kind": "ConfigMap", "metadata": {"name": "config-features"}, "data": ["a"]}, "not list"),
    ],
)
def test_another_document_than_config_features_is_refused(document: Any, message: str) -> None:
    with pytest.raises(NoFeatures, match=message):
        read_features(document)


def run(folder: Path, features: Any) -> Result:
    (folder / "features.yaml").write_text(yaml.safe_dump(features))
    (folder / "service.yaml").write_text(yaml.safe_dump(service({"nodeSelector": {"a": "b"}})))
    return CliRunner().invoke(check, ["--features", str(folder / "features.yaml"), str(folder / "service.yaml")])


def test_the_command_takes_a_clusters_flags(tmp_path: Path) -> None:
    result = run(tmp_path, config_features(**{"_example": "text", "kubernetes.podspec-nodeselector": "enabled"}))
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'service.yaml'}: accepted\n")
    assert run(tmp_path, config_features()).exit_code == 1


def test_the_command_says_what_is_wrong_with_the_flags(tmp_path: Path) -> None:
    result = run(tmp_path, {"kind": "Secret"})
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path / 'features.yaml'}: the ConfigMap config-features is wanted, not 'Secret'\n"
