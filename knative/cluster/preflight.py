"""Checks whether a cluster has what the objects need, and whether the gateway will send requests to the stages' pods.

Nothing is changed. Everything that is missing is reported at once.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from knative.cluster.certificates import certificate_problems
from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import DeployFailed, KindMissing, NotPermitted, PreflightFailed
from knative.cluster.objects import SERVICE_LABEL
from knative.cluster.pipeline_token import wanted_secrets
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import KEYS_ENTRY
from knative.webhook.check import is_knative_service, missing_flags
from knative.webhook.feature_flags import FeatureFlags, read_features

OLDEST_KNATIVE: Final = (1, 10)  # the oldest whose webhook accepts every field that we render
PRIVATE_NETWORKS: Final = "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7"
"""What a gateway follows without a setting: the default in functions/configuration/config.py."""

_SYSTEM_NAMESPACE: Final = "knative-serving"
_CLASS: Final = "autoscaling.knative.dev/class"
_SERVING_CERTS: Final = "serving-certs"  # the Secret that Knative makes with system-internal-tls, with a namespace's first pod
_EVENTING: Final = ("eventing.knative.dev", "flows.knative.dev")


def check(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Raises KindMissing or PreflightFailed, with a line for each thing that the objects need and the cluster lacks.

    say: gets a line for each check that could not be made, because reading is not permitted.
    """

    def found_by(look: Callable[[Cluster, list[KubernetesObject]], Iterator[str]]) -> list[str]:
        try:
            return list(look(cluster, objects))
        except NotPermitted as error:
            say(f"not checked, because reading it is not permitted: {error}")
            return []

    if problems := found_by(_namespace_problems):
        raise PreflightFailed(problems[0])
    missing = []
    for api_version, kind in dict.fromkeys((each["apiVersion"], each["kind"]) for each in objects):
        try:
            cluster.require(api_version, kind)
        except KindMissing as error:
            missing.append(str(error))
    looks = [_old_version, _missing_hpa, _missing_features, _missing_secrets, _missing_for_pods, _tls_problems]
    if not missing:
        looks.append(_missing_sinks)
    problems = [*missing, *(problem for look in looks for problem in found_by(look))]
    if problems:
        if len(problems) == len(missing):
            raise KindMissing("\n".join(problems))
        raise PreflightFailed("\n".join(problems))


def _namespace_problems(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    name = objects[0]["metadata"]["namespace"]
    namespace = cluster.get(Ref("v1", "Namespace", "", name))
    if namespace is None:
        yield f"namespace {name} does not exist; create it with: kubectl create namespace {name}"
    elif namespace["metadata"].get("deletionTimestamp") or (namespace.get("status") or {}).get("phase") == "Terminating":
        yield f"namespace {name} is being deleted and accepts nothing new; wait, then: kubectl create namespace {name}"


def _old_version(cluster: Cluster, _: list[KubernetesObject]) -> Iterator[str]:
    controller = cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "controller"))
    version = (controller or {"metadata": {}})["metadata"].get("labels", {}).get("app.kubernetes.io/version", "")
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < OLDEST_KNATIVE:
        oldest = ".".join(map(str, OLDEST_KNATIVE))
        yield f"Knative Serving {version} is too old; upgrade it to {oldest} or newer"


def _missing_hpa(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    templates = [each["spec"]["template"] for each in objects if each["kind"] == "Service"]
    if not any("hpa" in template["metadata"].get("annotations", {}).get(_CLASS, "") for template in templates):
        return
    if cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "autoscaler-hpa")) is None:
        yield "the class hpa needs Knative's HPA extension (Deployment autoscaler-hpa): install it, or use kpa"
    if not cluster.serves_group("metrics.k8s.io"):
        yield "the class hpa needs a metrics server (API metrics.k8s.io): install one, or use the class kpa"


def _missing_features(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    """Yields a line for each feature of Knative that pods use and config-features turns off: the webhook would reject them."""
    wanted: dict[str, list[str]] = {}
    features: FeatureFlags | None = None
    for service in filter(is_knative_service, objects):
        if not missing_flags(service):  # with Knative's defaults nothing is missing, so the cluster need not be asked
            continue
        if features is None:
            config_map = cluster.get(Ref("v1", "ConfigMap", _SYSTEM_NAMESPACE, "config-features"))
            features = FeatureFlags() if config_map is None else read_features(config_map)
        for flag, field in missing_flags(service, features).items():
            wanted.setdefault(flag, []).append(f"{service['metadata']['name']} sets {field.rpartition('.')[2]}")
    for flag, users in wanted.items():
        patch = f"""'{{"data":{{"{flag}":"enabled"}}}}'"""
        yield (
            f"{', '.join(users)}, which needs Knative's feature {flag}; enable it with: "
            f"kubectl -n {_SYSTEM_NAMESPACE} patch configmap config-features --type merge -p {patch}"
        )


def _missing_secrets(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    for ref, wanted in wanted_secrets(objects).items():
        found = cluster.get(ref)
        if found is None and (wanted.is_token or ref.name == _SERVING_CERTS):
            continue  # the deployer makes it, or Knative
        if found is None or not wanted.keys <= set(found.get("data") or {}):
            keys = sorted(wanted.keys)
            values = " ".join(f"--from-file={key}=…" if "." in key else f"--from-literal={key}=…" for key in keys)
            command = f"create it with: kubectl -n {ref.namespace} create secret generic {ref.name} {values}"
            if KEYS_ENTRY in keys:  # it holds hashes of keys
                make = f"python -m knative keys {ref.name}.yaml --make NAME"
                apply = f"kubectl -n {ref.namespace} apply -f {ref.name}.yaml"
                command = f"create it with: {make}, which prints a client's key, and {apply}"
            elif ref.name == _SERVING_CERTS:
                command = "its issuer writes none: give the CA as a ConfigMap, and name that in network.tls.ca_config_map"
            yield f"{ref} is missing or lacks {', '.join(keys)}; {command}"


def _tls_problems(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    """Yields a line for each thing that TLS between pods lacks: Knative's setting, the CA, a valid certificate."""
    gateway = next((each for each in filter(is_knative_service, objects) if "LAMINA_TLS_NAME" in _environment(each)), None)
    if gateway is None:
        return
    namespace, environment = gateway["metadata"]["namespace"], _environment(gateway)
    volumes = gateway["spec"]["template"]["spec"]["volumes"]
    if "LAMINA_TLS_CERTIFICATE" not in environment:
        network = (cluster.get(Ref("v1", "ConfigMap", _SYSTEM_NAMESPACE, "config-network")) or {}).get("data") or {}
        seen = network.get("system-internal-tls") or "Disabled"
        if seen.lower() != "enabled" and network.get("internal-encryption", "").lower() != "true":  # its former name
            yield (
                f"network.tls has no secret and so uses Knative's certificates, and config-network says system-internal-tls: "
                f"{seen}. Name a Secret with certificates in network.tls.secret, or enable it, which needs cert-manager: "
                f"kubectl -n {_SYSTEM_NAMESPACE} patch configmap config-network --type merge -p "
                """'{"data":{"system-internal-tls":"Enabled"}}'; """
                f"kubectl -n {_SYSTEM_NAMESPACE} rollout restart deployment activator"
            )
    authority = None
    for name in [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]:
        ref = Ref("v1", "ConfigMap", namespace, name)
        authority = ((cluster.get(ref) or {}).get("data") or {}).get("ca.crt")
        if authority is None:
            yield f"{ref} is missing or lacks ca.crt; write the CA's certificates there, as trust-manager does"
            return
    tls = next((volume["secret"]["secretName"] for volume in volumes if volume["name"] == "tls"), _SERVING_CERTS)
    secret = cluster.get(Ref("v1", "Secret", namespace, tls))
    if secret is not None and {"tls.crt", "tls.key", *(["ca.crt"] if authority is None else [])} <= set(
        secret.get("data") or {}
    ):
        for problem in certificate_problems(secret, authority, environment["LAMINA_TLS_NAME"]):
            yield f"Secret {namespace}/{tls}: {problem}"


def _environment(service: KubernetesObject) -> dict[str, str]:
    """The variables of a Service's container that have a value in the manifest."""
    env = service["spec"]["template"]["spec"]["containers"][0].get("env", [])
    return {entry["name"]: entry["value"] for entry in env if "value" in entry}


def _missing_for_pods(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    """Yields a line for each ServiceAccount and image pull secret that pods name and the cluster lacks.

    Without its ServiceAccount no pod is created, and Knative does not say why.
    """
    own = set(map(Ref.of, objects))
    wanted: dict[Ref, list[str]] = {}
    for service in filter(is_knative_service, objects):
        pod, metadata = service["spec"]["template"]["spec"], service["metadata"]
        names = [("ServiceAccount", pod.get("serviceAccountName"))]
        names += [("Secret", each["name"]) for each in pod.get("imagePullSecrets", [])]
        for kind, name in names:
            if name and (ref := Ref("v1", kind, metadata["namespace"], name)) not in own:
                wanted.setdefault(ref, []).append(metadata["name"])
    for ref, users in wanted.items():
        if cluster.get(ref) is None:
            yield f"{ref} is missing; pods of {', '.join(users)} need it"


def _missing_sinks(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    own = set(map(Ref.of, objects))
    for each in objects:
        if each["apiVersion"].split("/")[0] not in _EVENTING:
            continue
        for ref in dict.fromkeys(_destinations(each["spec"], each["metadata"]["namespace"])):
            if ref not in own and cluster.serves(ref.api_version, ref.kind) and cluster.get(ref) is None:
                user = f"{each['kind']} {each['metadata']['name']}"
                yield f"{ref}, a destination of {user}, does not exist; create it, or name another sink"


def _destinations(value: Any, namespace: str) -> Iterator[Ref]:
    """Yields every `ref: {apiVersion, kind, name}` at any depth of a spec. namespace: that of references which name none."""
    if isinstance(value, dict):
        reference = value.get("ref")
        if isinstance(reference, dict):
            yield Ref(reference["apiVersion"], reference["kind"], reference.get("namespace", namespace), reference["name"])
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _destinations(inner, namespace)


def check_pod_network(
    cluster: Cluster, gateway: KubernetesObject, stages: Iterable[KubernetesObject], say: Callable[[str], None]
) -> None:
    """Raises DeployFailed if a pod of a stage is outside the network of pods to which the gateway sends requests.

    Call it before the gateway switches. say: gets a line if reading pods is not permitted, and nothing was checked.
    """
    networks = followed_networks(gateway)
    try:
        refused = [
            refused
            for stage in stages
            for refused in refused_pods(
                networks,
                cluster.find("v1", "Pod", stage["metadata"]["namespace"], f"{SERVICE_LABEL}={stage['metadata']['name']}"),
            )
        ]
    except NotPermitted as error:
        say(f"the pods' network is not checked, because reading pods is not permitted: {error}")
        return
    if refused:
        raise DeployFailed(
            f"the gateway would not follow pods outside of {networks}: {', '.join(refused)}; set gateway.pod_network to the "
            "network of this cluster's pods. The gateway that serves was not changed"
        )


def followed_networks(gateway: KubernetesObject) -> str:
    """CIDRs, separated by commas. The gateway sends requests directly to pods with an address in them.

    Read from the environment of its Service.
    """
    return _environment(gateway).get("LAMINA_POD_NETWORK", PRIVATE_NETWORKS)


def refused_pods(networks: str, pods: Iterable[KubernetesObject]) -> Iterator[str]:
    """Yields name and addresses of each pod that has no address in `networks`, CIDRs separated by commas.

    A pod may have an IPv4 and an IPv6 address; one in the networks is enough.
    """
    followed = [ipaddress.ip_network(each.strip()) for each in networks.split(",")]
    for pod in pods:
        status = pod.get("status") or {}
        addresses = [each["ip"] for each in status.get("podIPs", [])] or [each for each in [status.get("podIP")] if each]
        if addresses and not any(ipaddress.ip_address(each) in network for each in addresses for network in followed):
            yield f"{pod['metadata']['name']} ({', '.join(addresses)})"
