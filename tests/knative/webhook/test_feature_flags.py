"""What a cluster's feature flags let through, field by field, and how flags are read."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.commands.check import check
from knative.webhook.check import validate
from knative.webhook.feature_flags import POD_FIELDS, VOLUME_FIELDS, FeatureFlags, NoFeatures, read_features
from tests.support.knative.manifests import service

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
MOUNT = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
VARIABLE = {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
CAPABILITIES = service(container={"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}})
# (flag, field of the pod, Service that needs the flag)
FLAGGED: list[tuple[str, str, dict[str, Any]]] = [
    *((POD_FIELDS[name], name, service({name: value})) for name, value in POD.items()),
    *(
        (VOLUME_FIELDS[kind], f"volumes[0].{kind}", service({"volumes": [{"name": "data", kind: value}]}, MOUNT))
        for kind, value in VOLUMES.items()
    ),
    ("kubernetes.podspec-fieldref", "containers[0].env[0].valueFrom.fieldRef", service(container={"env": [VARIABLE]})),
    ("kubernetes.containerspec-addcapabilities", "containers[0].securityContext.capabilities.add", CAPABILITIES),
]


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


@pytest.mark.parametrize(("flag", "field", "manifest"), FLAGGED, ids=[flag for flag, _, _ in FLAGGED])
def test_a_field_passes_only_with_its_flag(flag: str, field: str, manifest: dict[str, Any]) -> None:
    assert flag in refused(manifest)[f"{AT}.{field}"]
    assert refused(manifest, **on(flag)) == {}
    if flag in POD_FIELDS.values():
        assert refused(manifest, **on(flag, "allowed")) == {}
        others = {other: "Enabled" for other in POD_FIELDS.values() if other != flag}
        assert refused(manifest, **others).keys() >= {f"{AT}.{field}"}


def test_empty_dir_passes_unless_its_flag_is_off() -> None:
    manifest = service({"volumes": [{"name": "data", "emptyDir": {}}]}, MOUNT)
    assert refused(manifest) == {}
    assert refused(manifest, **on(VOLUME_FIELDS["emptyDir"], "Disabled")).keys() == {f"{AT}.volumes[0].emptyDir"}


def test_added_capabilities_need_enabled_not_allowed() -> None:
    assert refused(CAPABILITIES, **on("kubernetes.containerspec-addcapabilities", "Allowed"))


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
