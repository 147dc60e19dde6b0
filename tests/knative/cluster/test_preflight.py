"""Everything that a cluster lacks is reported at once, and nothing is created before."""

import base64
from datetime import timedelta

import pytest

from functions.configuration.config import GatewayConfig, read_config
from knative.cluster.errors import DeployFailed, KindMissing, PreflightFailed
from knative.cluster.preflight import PRIVATE_NETWORKS, refused_pods
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.certificates import CertificateAuthority
from tests.support.environments import GATEWAY
from tests.support.knative.kubernetes_api import EVENTING
from tests.support.knative.manifests import features, objects, resource, secret, stage_name
from tests.support.knative.site import Site


def test_all_that_is_missing_is_reported_and_nothing_is_created(site: Site) -> None:
    site.api.kinds |= EVENTING
    site.api.remove("v1", "secrets", "default", "lamina-store")
    spec = {"eventing": {"dead_letter_sink": "dead-letters"}, "gateway": {"api_keys_secret": "chat-api-keys"}}
    message = site.fail(objects(**spec), expected=PreflightFailed)
    assert "lamina-store is missing or lacks" in message
    assert "kubectl -n default create secret generic lamina-store" in message
    assert "chat-api-keys is missing" in message
    assert "python -m knative keys chat-api-keys.yaml --make NAME" in message
    assert "kubectl -n default apply -f chat-api-keys.yaml" in message
    assert "Service default/dead-letters, a destination of Broker chat" in message
    assert site.api.applied == []
    assert site.api.named("secrets") == site.api.named("configmaps") == site.api.named("leases") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "spec", "message"),
    [
        ("serving.knative.dev/v1", {}, "install Knative Serving"),
        ("eventing.knative.dev/v1", {"eventing": {"dead_letter_sink": "dead-letters"}}, "install Knative Eventing"),
    ],
)
@pytest.mark.usefixtures("eventing")
def test_without_a_part_of_knative_nothing_is_applied(site: Site, absent: str, spec: dict[str, object], message: str) -> None:
    del site.api.kinds[absent]
    assert message in site.fail(objects(**spec), expected=KindMissing)
    assert site.api.applied == []


def test_without_the_prometheus_operator_monitoring_is_refused(site: Site) -> None:
    message = site.fail([*objects(), resource("PodMonitor", "chat", "monitoring.coreos.com/v1")], expected=KindMissing)
    assert "does not serve PodMonitor" in message
    assert "Prometheus operator, or leave monitoring out" in message
    assert site.api.applied == []


def deployment(name: str, version: str) -> KubernetesObject:
    labels = {"app.kubernetes.io/version": version}
    return resource("Deployment", name, "apps/v1", namespace="knative-serving", labels=labels)


def test_an_old_knative_is_refused(site: Site) -> None:
    site.api.put(deployment("controller", "1.9.2"))
    assert "1.9.2 is too old" in site.fail(objects(), expected=PreflightFailed)


def test_hpa_needs_its_extension_and_a_metrics_server(site: Site) -> None:
    rendered = objects(stage={"autoscaling": {"class": "hpa", "min_scale": 1}})
    assert "HPA extension" in site.fail(rendered, expected=PreflightFailed)
    site.api.put(deployment("autoscaler-hpa", "1.18.0"))
    assert "metrics server" in site.fail(rendered, expected=PreflightFailed)
    site.api.kinds["metrics.k8s.io/v1"] = {"PodMetrics": "pods"}
    site.deployer.deploy(rendered)


def test_a_missing_namespace_and_one_that_is_being_deleted_are_named(site: Site) -> None:
    site.api.add_namespace("default", phase="Terminating")
    message = site.fail(objects(), expected=PreflightFailed)
    assert "namespace default is being deleted" in message
    assert "kubectl create namespace default" in message
    site.api.remove("v1", "namespaces", "", "default")
    assert "kubectl create namespace default" in site.fail(objects(), expected=PreflightFailed)
    assert site.api.applied == []


def test_a_namespace_that_may_not_be_read_is_reported(site: Site) -> None:
    site.api.forbidden.add(("get", "namespaces"))
    site.deployer.deploy(objects())
    assert any("not checked, because reading it is not permitted" in line for line in site.said)


def test_a_feature_that_is_off_is_named_with_field_and_command(site: Site) -> None:
    site.api.put(features(**{"kubernetes.podspec-nodeselector": "enabled"}))
    pod = {"node_selector": {"pool": "models"}, "priority_class": "serving"}
    message = site.fail(objects(stage={"pod": pod}), expected=PreflightFailed)
    assert "-s0 sets priorityClassName, chat" in message
    command = "which needs Knative's feature kubernetes.podspec-priorityclassname; enable it with: kubectl -n knative-serving"
    assert command in message
    assert "nodeSelector" not in message
    assert site.api.applied == []


def test_missing_accounts_and_pull_secrets_are_named(site: Site) -> None:
    """Knative makes a Deployment of them, and no pod ever comes."""
    rendered = objects(stage={"service_account": "chat-reader", "pod": {"image_pull_secrets": ["registry"]}})
    first, second = site.fail(rendered, expected=PreflightFailed).splitlines()
    assert first.startswith("ServiceAccount default/chat-reader is missing; pods of chat-")
    assert first.count("-s") == 3
    assert second.startswith("Secret default/registry is missing; pods of chat-")
    assert site.api.applied == []
    site.api.put(resource("ServiceAccount", "chat-reader"))
    site.api.put(secret("registry", ".dockerconfigjson"))
    site.deployer.deploy(rendered)


# -- TLS between pods ---------------------------------------------------------------------------------------------------


def tls_secret(name: str, files: dict[str, str]) -> KubernetesObject:
    return resource("Secret", name, data={key: base64.b64encode(value.encode()).decode() for key, value in files.items()})


def config_network(**data: str) -> KubernetesObject:
    return resource("ConfigMap", "config-network", namespace="knative-serving", data=data)


def test_knatives_certificates_need_its_setting(site: Site) -> None:
    rendered = objects(network={"tls": {}})
    message = site.fail(rendered, expected=PreflightFailed)
    assert "config-network says system-internal-tls: Disabled" in message
    assert """patch configmap config-network --type merge -p '{"data":{"system-internal-tls":"Enabled"}}'""" in message
    assert "serving-certs" not in message, "Knative makes it with the first pod of the namespace"
    site.api.put(config_network(**{"system-internal-tls": "enabled"}))
    without_ca = {key: value for key, value in CertificateAuthority().secret("kn-user-default").items() if key != "ca.crt"}
    site.api.put(tls_secret("serving-certs", without_ca))
    message = site.fail(rendered, expected=PreflightFailed)
    assert message == (
        "Secret default/serving-certs is missing or lacks ca.crt; its issuer writes none: give the CA as a ConfigMap, and name "
        "that in network.tls.ca_config_map"
    )
    site.api.put(tls_secret("serving-certs", CertificateAuthority().secret("kn-user-default", "data-plane.knative.dev")))
    site.deployer.deploy(rendered)


@pytest.mark.parametrize(
    ("names", "until", "changed", "message"),
    [
        (["chat.default"], timedelta(hours=-1), {}, "the certificate has expired on 20"),
        (["other.default"], timedelta(days=1), {}, "the certificate has the DNS names other.default, not chat.default; add"),
        (["chat.default"], timedelta(days=1), {"ca.crt": CertificateAuthority().pem}, "is not signed by the CA in ca.crt"),
        (["chat.default"], timedelta(days=1), {"tls.key": CertificateAuthority().secret("x")["tls.key"]}, "is not the key of"),
        (["chat.default"], timedelta(days=1), {"tls.crt": "x"}, "tls.crt, tls.key or the CA is not PEM"),
    ],
)
def test_a_certificate_that_pods_could_not_use_is_refused(
    site: Site, names: list[str], until: timedelta, changed: dict[str, str], message: str
) -> None:
    rendered = objects(network={"tls": {"secret": "chat-tls"}})
    assert "Secret default/chat-tls is missing or lacks ca.crt, tls.crt, tls.key; create it with" in site.fail(
        rendered, expected=PreflightFailed
    )
    authority = CertificateAuthority()
    site.api.put(tls_secret("chat-tls", authority.secret(*names, until=until) | changed))
    (line,) = site.fail(rendered, expected=PreflightFailed).splitlines()
    assert line.startswith("Secret default/chat-tls: ")
    assert message in line
    assert site.api.applied == []
    site.api.put(tls_secret("chat-tls", authority.secret("chat.default")))
    site.deployer.deploy(rendered)


def test_a_ca_in_a_config_map_is_the_one_that_counts(site: Site) -> None:
    rendered = objects(network={"tls": {"secret": "chat-tls", "ca_config_map": "trust"}})
    authority, other = CertificateAuthority(), CertificateAuthority()
    site.api.put(tls_secret("chat-tls", authority.secret("chat.default")))
    assert "ConfigMap default/trust is missing or lacks ca.crt" in site.fail(rendered, expected=PreflightFailed)
    site.api.put(resource("ConfigMap", "trust", data={"ca.crt": other.pem}))
    assert "is not signed by the CA" in site.fail(rendered, expected=PreflightFailed)
    site.api.put(resource("ConfigMap", "trust", data={"ca.crt": other.pem + authority.pem}))
    site.deployer.deploy(rendered)


# -- The network that the gateway follows -----------------------------------------------------------------------------

ONLY_TEN = {"gateway": {"pod_network": "10.0.0.0/8"}}


def pod(name: str, service: str, *addresses: str, **labels: str) -> KubernetesObject:
    own = {"serving.knative.dev/service": service, **{f"app.kubernetes.io/{key}": value for key, value in labels.items()}}
    status = {"phase": "Running", "podIP": addresses[0], "podIPs": [{"ip": each} for each in addresses]} if addresses else {}
    return resource("Pod", name, labels=own, status=status)


def test_a_wrong_pod_network_is_found_before_the_gateway_switches(site: Site) -> None:
    """It was a silent outage: the gateway refused every address, and deploy reported success."""
    rendered = objects(**ONLY_TEN)
    site.api.put(pod("far", stage_name(rendered, 1), "192.168.3.4"))
    message = site.fail(rendered, expected=DeployFailed)
    assert "outside of 10.0.0.0/8: far (192.168.3.4); set gateway.pod_network" in message
    assert "chat" not in site.api.applied


def test_pods_inside_the_network_are_accepted(site: Site) -> None:
    rendered = objects()
    site.api.put(pod("near", stage_name(rendered, 1), "192.168.3.4"))
    assert site.deployer.deploy(rendered).startswith("http")


def test_pods_that_may_not_be_read_are_reported(site: Site) -> None:
    rendered = objects(**ONLY_TEN)
    site.api.put(pod("far", stage_name(rendered, 1), "192.168.3.4"))
    site.api.forbidden.add(("list", "pods"))
    site.deployer.deploy(rendered)
    assert any(line.startswith("the pods' network is not checked") for line in site.said)


def test_status_names_pods_that_the_gateway_does_not_follow(site: Site) -> None:
    """For example pods on new nodes with a network of their own."""
    rendered = objects(**ONLY_TEN)
    site.deployer.deploy(rendered)
    assert site.status()["troubles"] == []
    labels = {"instance": "chat", "component": "stage", "managed-by": "lamina"}
    site.api.put(pod("far", stage_name(rendered, 1), "192.168.3.4", **labels))
    (trouble,) = site.status()["troubles"]
    assert trouble.startswith("chat does not follow pods outside of 10.0.0.0/8: far (192.168.3.4); requests go by the")


def test_a_pod_is_refused_if_none_of_its_addresses_is_inside() -> None:
    pods = [pod("a", "s", "10.1.1.1"), pod("b", "s", "192.168.1.1", "fd00::7"), pod("c", "s"), pod("d", "s", "172.16.0.1")]
    assert list(refused_pods("10.0.0.0/8, fd00::/64", pods)) == ["d (172.16.0.1)"]


def test_the_default_networks_are_the_gateways_own() -> None:
    config = read_config(GATEWAY)
    assert isinstance(config, GatewayConfig)
    assert ",".join(map(str, config.pod_network)) == PRIVATE_NETWORKS
