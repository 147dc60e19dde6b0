"""A real cluster for tests/pipeline/test_cluster.py: its settings, a pipeline on it, clients of its gateway, a probe."""

import base64
import contextlib
import http.client
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from tokenizers import Tokenizer

from knative.cluster.client import Cluster, Ref
from knative.cluster.deployer import Deployer
from knative.cluster.garbage import GarbageCollector
from knative.cluster.objects import REVISION_LABEL, label, phase_of, readiness
from knative.cluster.status import services_of
from knative.commands.fleet import deploy_fleet
from knative.commands.render import fleet_objects
from knative.render.gitops import for_gitops, with_kustomization
from knative.render.rendering import render, resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import METRICS_PORT
from knative.spec.kubernetes_object import KubernetesObject, to_yaml
from knative.spec.model_shape import published_shape
from knative.spec.pipeline_spec import Autoscaling, ModelSpec, PipelineSpec, Resources, StageSpec, StoreSpec
from storage.models.model_repository import ModelManifest
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

NAME: Final = "lamina-test"
MODEL: Final = "lamina-test-smollm2"
FLEET: Final = "lamina-test-fleet"
INSTANCE: Final = f"app.kubernetes.io/instance={NAME}"
STAGES: Final = f"{INSTANCE},app.kubernetes.io/component=stage"
SERVICE: Final = "serving.knative.dev/service"
MAX_TOKENS: Final = 48
PROMPTS: Final = ("The capital of France is", "Once upon a time", "Water is made of", "A prime number is")
NEEDED: Final = {
    "LAMINA_TEST_KUBECONFIG": "kubeconfig of a cluster with Knative Serving, with resources for ten pods of 1 CPU and 2 GiB",
    "LAMINA_TEST_IMAGE": "an image made by `make image`, where that cluster can pull it",
    "LAMINA_TEST_STORE_ENDPOINT": "S3-compatible store as pods reach it",
    "AWS_ACCESS_KEY_ID": "its keys; the bucket (LAMINA_TEST_STORE_BUCKET, lamina) must exist",
    "AWS_SECRET_ACCESS_KEY": "likewise",
}
"""Optional: LAMINA_TEST_CONTEXT; LAMINA_TEST_NAMESPACE (lamina-test), which is created, and then removed, if it does not exist;
LAMINA_TEST_STORE_LOCAL_ENDPOINT, the store as this machine reaches it; LAMINA_TEST_INGRESS, such as http://203.0.113.7, if the
domain of Knative's URLs does not resolve here; LAMINA_TEST_OTHER_IMAGE, a second name of the image, without which no test
changes the image."""


@dataclass(frozen=True)
class Settings:
    kubeconfig: str
    context: str | None
    namespace: str
    image: str
    store: StoreSettings  # as this machine reaches it
    store_endpoint: str  # as pods reach it
    ingress: str | None
    other_image: str | None


def missing() -> list[str]:
    """Variables that the environment lacks."""
    return [name for name in NEEDED if not os.environ.get(name)]


def settings() -> Settings:
    endpoint = os.environ["LAMINA_TEST_STORE_ENDPOINT"]
    return Settings(
        kubeconfig=os.environ["LAMINA_TEST_KUBECONFIG"],
        context=os.environ.get("LAMINA_TEST_CONTEXT"),
        namespace=os.environ.get("LAMINA_TEST_NAMESPACE", "lamina-test"),
        image=os.environ["LAMINA_TEST_IMAGE"],
        store=StoreSettings(
            endpoint_url=os.environ.get("LAMINA_TEST_STORE_LOCAL_ENDPOINT", endpoint),
            bucket=os.environ.get("LAMINA_TEST_STORE_BUCKET", "lamina"),
            region=os.environ.get("LAMINA_TEST_STORE_REGION", "us-east-1"),
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        ),
        store_endpoint=endpoint,
        ingress=os.environ.get("LAMINA_TEST_INGRESS"),
        other_image=os.environ.get("LAMINA_TEST_OTHER_IMAGE"),
    )


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds:g} s"
        time.sleep(1)


@contextmanager
def core_api(where: Settings) -> Iterator[client.CoreV1Api]:
    """For namespaces and killing pods, which the deployer never does."""
    api = config.new_client_from_config(where.kubeconfig, where.context)
    try:
        yield client.CoreV1Api(api)
    finally:
        api.close()


@contextmanager
def namespace(where: Settings) -> Iterator[None]:
    """The namespace exists meanwhile; it is removed afterwards if it was created here."""
    with core_api(where) as core:
        try:
            core.create_namespace({"metadata": {"name": where.namespace}})
        except ApiException as error:
            if error.status != 409:
                raise
            yield
            return
        try:
            yield
        finally:
            core.delete_namespace(where.namespace)


@contextmanager
def as_deployer(cluster: Cluster, where: Settings, role: KubernetesObject) -> Iterator[Cluster]:
    """The cluster as seen by a ServiceAccount with this Role only."""
    name = role["metadata"]["name"]
    metadata = {"name": name, "namespace": where.namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", **metadata}
    binding = {"roleRef": reference, "subjects": [subject]}
    made = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        role,
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": metadata, **binding},
    ]
    for each in made:
        cluster.apply(each)
    api = config.new_client_from_config(where.kubeconfig, where.context)
    try:
        asked = {"spec": {"expirationSeconds": 3600}}
        answer = client.CoreV1Api(api).create_namespaced_service_account_token(name, where.namespace, asked)
        settings = client.Configuration()
        settings.host, settings.ssl_ca_cert = api.configuration.host, api.configuration.ssl_ca_cert
        settings.verify_ssl = api.configuration.verify_ssl
        settings.api_key = {"authorization": f"Bearer {answer.status.token}"}
        yield Cluster(client.ApiClient(settings), f"ServiceAccount {name}", where.namespace)
    finally:
        api.close()
        for each in reversed(made):
            cluster.delete(Ref.of(each))


def kill(where: Settings, pod: str) -> None:
    """Deletes the pod at once, without SIGTERM."""
    with core_api(where) as core:
        core.delete_namespaced_pod(pod, where.namespace, grace_period_seconds=0)


def drain(where: Settings, pod: str) -> None:
    """Deletes the pod with its full grace period, as draining a node does."""
    with core_api(where) as core:
        core.delete_namespaced_pod(pod, where.namespace)


def metric(where: Settings, pod: str, name: str) -> float:
    """A metric of a pod's function, summed over all labels, read through the Kubernetes API, which policies may block."""
    with core_api(where) as core:
        page: str = core.connect_get_namespaced_pod_proxy_with_path(f"{pod}:{METRICS_PORT}", where.namespace, "metrics")
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))


def pods(cluster: Cluster, where: Settings, selector: str) -> list[KubernetesObject]:
    """Pods that are not terminating."""
    found = cluster.find("v1", "Pod", where.namespace, selector)
    return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


@dataclass(frozen=True)
class Gateway:
    """A gateway, asked through the ingress as clients do."""

    url: str
    ingress: str | None
    model: str

    def complete(self, prompt: str, max_tokens: int, *, temperature: float = 0, key: str | None = None) -> str:
        """key: the request's Idempotency-Key. Raises AssertionError for any other status than 200."""
        with self._asked(prompt, max_tokens, key, stream=False, temperature=temperature) as response:
            text: str = json.load(response)["choices"][0]["text"]
        return text

    def stream(self, prompt: str, max_tokens: int, key: str | None = None) -> Iterator[str]:
        """As `complete`, piece by piece."""
        with self._asked(prompt, max_tokens, key, stream=True, temperature=0) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data.startswith("{"):
                    document = json.loads(data)
                    assert "error" not in document, document
                    yield "".join(choice["text"] for choice in document["choices"])
        raise AssertionError("the stream ended before its last event")

    @contextmanager
    def api(self) -> Iterator[httpx.Client]:
        """A client of the paths below /v1."""
        headers = {"Host": urlsplit(self.url).netloc}
        with httpx.Client(base_url=f"{self.ingress or self.url}/v1", headers=headers, timeout=600) as client:
            yield client

    @contextmanager
    def _asked(
        self, prompt: str, max_tokens: int, key: str | None, *, stream: bool, temperature: float
    ) -> Iterator[http.client.HTTPResponse]:
        place, host = urlsplit(self.ingress or self.url), urlsplit(self.url).netloc
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        document = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
        document["stream"] = stream
        with contextlib.closing(kind(place.hostname or "", place.port, timeout=600)) as connection:
            headers = {"Host": host, "Content-Type": "application/json"} | ({} if key is None else {"Idempotency-Key": key})
            connection.request("POST", "/v1/completions", json.dumps(document), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise AssertionError(f"{response.status}: {response.read()[:500]!r}")
            yield response


@contextmanager
def conversing(count: int, converse: Callable[[int, threading.Event], None]) -> Iterator[None]:
    """Runs `converse` in `count` threads, each with its number, and sets the event at the end.

    Waits for all of them then, and raises what one raised.
    """
    over = threading.Event()
    with ThreadPoolExecutor(count) as executor:
        asked = [executor.submit(converse, number, over) for number in range(count)]
        try:
            yield
        finally:
            over.set()
    for each in asked:
        each.result()


@dataclass
class Conversations:
    """Many clients ask questions repeatedly; every answer must equal the one without load."""

    gateway: Gateway
    expected: dict[str, str]
    max_tokens: int
    streaming: bool = False
    answers: int = 0
    wrong: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, count: int) -> Iterator["Conversations"]:
        """Waits for all answers at the end, and fails if one was wrong or missing."""
        with conversing(count, self._converse):
            yield self
        assert self.answers
        assert not self.wrong

    def _ask(self, prompt: str) -> str:
        if self.streaming:
            return "".join(self.gateway.stream(prompt, self.max_tokens))
        return self.gateway.complete(prompt, self.max_tokens)

    def _converse(self, number: int, over: threading.Event) -> None:
        prompts = list(self.expected)
        while not over.is_set():
            prompt = prompts[number % len(prompts)]
            number += 1
            try:
                text = self._ask(prompt)
            except (AssertionError, OSError, http.client.HTTPException) as error:
                self.wrong.append(f"{prompt!r}: {error!r}")
                continue
            self.answers += 1
            if text != self.expected[prompt]:
                self.wrong.append(f"{prompt!r}: {text!r}")


_PROBE: Final = """
import http.server, json, os, sys, threading, time, urllib.error, urllib.request
seen = {}
class Sink(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen[self.headers["ce-id"]] = {"type": self.headers["ce-type"], "data": json.loads(body)}
        self.send_response(202); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("", 8080), Sink)
threading.Thread(target=server.serve_forever, daemon=True).start()
event = json.loads(os.environ["EVENT"])
headers = {"ce-specversion": "1.0", "ce-source": "/probe", "ce-id": event["id"], "ce-type": event["type"],
           "content-type": "application/json"}
for _ in range(2):  # delivered twice: one answer all the same
    request = urllib.request.Request(os.environ["BROKER"], json.dumps(event["data"]).encode(), headers)
    urllib.request.urlopen(request, timeout=60).close()
deadline = time.monotonic() + 300
while not seen and time.monotonic() < deadline:
    time.sleep(0.2)
time.sleep(20)
print("ANSWERS " + json.dumps(seen), flush=True)
"""


class Probe:
    """A pod that sends one event to a Broker, twice, and is the sink of the replies."""

    name: Final = "lamina-test-probe"

    def __init__(self, cluster: Cluster, where: Settings) -> None:
        self._cluster = cluster
        self._where = where

    @property
    def sink(self) -> str:
        return f"http://{self.name}.{self._where.namespace}.svc.cluster.local"

    def ask(self, broker_url: str, event: dict[str, Any]) -> dict[str, Any]:
        """Answers by their id: type and data."""
        for manifest in (self._service(), self._pod(broker_url, event)):
            self._cluster.apply(manifest)
        try:
            wait_until(lambda: bool(self._answers()), 600, "the answer to an event")
            answers: dict[str, Any] = json.loads(self._answers()[0].removeprefix("ANSWERS "))
        finally:
            self.remove()
        return answers

    def remove(self) -> None:
        for kind in ("Pod", "Service"):
            self._cluster.delete(Ref("v1", kind, self._where.namespace, self.name))

    def _answers(self) -> list[str]:
        lines = self._cluster.log_tail(self._where.namespace, self.name, "probe", 50)
        return [line for line in lines if line.startswith("ANSWERS ")]

    def _metadata(self) -> dict[str, Any]:
        return {"name": self.name, "namespace": self._where.namespace, "labels": {"app": self.name}}

    def _service(self) -> KubernetesObject:
        spec = {"selector": {"app": self.name}, "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": self._metadata(), "spec": spec}

    def _pod(self, broker_url: str, event: dict[str, Any]) -> KubernetesObject:
        container = {
            "name": "probe",
            "image": self._where.image,
            "command": ["python", "-c", _PROBE],
            "env": [{"name": "BROKER", "value": broker_url}, {"name": "EVENT", "value": json.dumps(event)}],
            "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}},
        }
        security = {"runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": self._metadata(), "spec": spec}


class Scenario:
    """A pipeline on a real cluster, with its answers, Services and pods: shared by the steps of the test."""

    def __init__(self, where: Settings, store: ObjectStore, publications: list[ModelManifest], tokenizer: Tokenizer) -> None:
        """publications: those that specs may name. tokenizer: that of MODEL."""
        self.where = where
        self.tokenizer = tokenizer
        self.said: list[str] = []
        self.cluster = Cluster.connect(where.kubeconfig, where.context)
        self.deployer = Deployer(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.garbage = GarbageCollector(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.expected: dict[str, str] = {}
        self.store = store
        self._published = {(each.name, each.dtype): (each, published_shape(store, each)) for each in publications}
        self._gateway: Gateway | None = None

    @property
    def gateway(self) -> Gateway:
        assert self._gateway is not None, "nothing was deployed: an earlier step failed"
        return self._gateway

    @property
    def conversations(self) -> Conversations:
        return Conversations(self.gateway, {prompt: self.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS)

    @property
    def streams(self) -> Conversations:
        return Conversations(self.gateway, {prompt: self.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS, streaming=True)

    def gateway_at(self, url: str) -> Gateway:
        return Gateway(url, self.where.ingress, MODEL)

    def spec(self, **changes: Any) -> PipelineSpec:
        spec = PipelineSpec(
            name=NAME,
            namespace=self.where.namespace,
            model=ModelSpec(name=MODEL, dtype="float32"),
            cut="0:10,10:20,20:30",
            image=self.where.image,
            stage=StageSpec(resources=Resources(cpu="1", memory="2Gi"), kv_cache="256Mi", autoscaling=Autoscaling(max_scale=3)),
            store=StoreSpec(endpoint=self.where.store_endpoint, bucket=self.where.store.bucket, region=self.where.store.region),
        )
        return msgspec.structs.replace(spec, **changes)

    def resolved(self, spec: PipelineSpec) -> ResolvedPipeline:
        return resolve(spec, lambda dtype: self._published[spec.model.name, dtype])

    def objects(self, spec: PipelineSpec) -> list[KubernetesObject]:
        return [each for rendered in render(self.resolved(spec)).values() for each in rendered]

    def write_folder(self, folder: Path, spec: PipelineSpec) -> ResolvedPipeline:
        """As `render --gitops --output` does, into an emptied folder."""
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        pipeline = self.resolved(spec)
        for name, objects in with_kustomization(for_gitops(pipeline, render(pipeline))).items():
            (folder / name).write_text(to_yaml(objects))
        return pipeline

    def deploy(self, **changes: Any) -> None:
        url = self.deployer.deploy(self.objects(self.spec(**changes)))
        self._gateway = self.gateway_at(url)

    def deploy_fleet(self, folder: Path, members: Mapping[str, dict[str, Any]]) -> Gateway:
        """Deploys the fleet FLEET by a file in `folder`, as the command does. members: by name, what their specs say."""
        where, path = self.where, folder / "fleet.yaml"
        store = {"endpoint": where.store_endpoint, "bucket": where.store.bucket, "region": where.store.region}
        fleet = {"kind": "Fleet", "name": FLEET, "namespace": where.namespace, "image": where.image, "store": store}
        stage = {"resources": {"cpu": "1", "memory": "2Gi"}, "kv_cache": "256Mi"}
        fleet["members"] = [{"name": name, "stage": stage} | said for name, said in members.items()]
        path.write_text(yaml.safe_dump(fleet))
        read, objects = fleet_objects(path, lambda: nullcontext(self.store))
        return self.gateway_at(deploy_fleet(self.deployer, read, objects, whole=True, force=False))

    def delete_fleet(self) -> None:
        for name in (*self.deployer.members_of(FLEET), FLEET):
            self.deployer.delete(name)

    def has_hpa(self) -> bool:
        """Whether the cluster has what the class hpa needs."""
        extension = Ref("apps/v1", "Deployment", "knative-serving", "autoscaler-hpa")
        return self.cluster.get(extension) is not None and self.cluster.serves_group("metrics.k8s.io")

    def replaced_revisions(self, name: str = NAME) -> set[str]:
        """Revisions of the pipeline that its Services have replaced."""
        found = set()
        for service in services_of(self.cluster, self.where.namespace, name):
            selector = f"{SERVICE}={service['metadata']['name']}"
            revisions = self.cluster.find("serving.knative.dev/v1", "Revision", self.where.namespace, selector)
            newest = (service.get("status") or {}).get("latestCreatedRevisionName")
            found |= {each["metadata"]["name"] for each in revisions} - {newest}
        return found

    def has_only_new_pods(self, name: str) -> bool:
        """Whether all Services of the pipeline are Ready, and no revision that they have replaced has a pod."""
        old = self.replaced_revisions(name)
        found = pods(self.cluster, self.where, f"app.kubernetes.io/instance={name}")
        ready = all(readiness(each).ready for each in services_of(self.cluster, self.where.namespace, name))
        return ready and not any(label(pod, REVISION_LABEL) in old for pod in found)

    def gateway_pods(self) -> list[str]:
        """Names of the gateway's pods that are ready and not terminating."""
        found = pods(self.cluster, self.where, f"{INSTANCE},app.kubernetes.io/component=gateway")
        return sorted(pod["metadata"]["name"] for pod in found if phase_of(pod) == "ready")

    def held_sequences(self) -> float:
        """Sequences that hold KV at stages."""
        stages = [pod for pod in pods(self.cluster, self.where, STAGES) if phase_of(pod) == "ready"]
        return sum(metric(self.where, pod["metadata"]["name"], "lamina_stage_sequences") for pod in stages)

    def judged_answers(self) -> tuple[float, float]:
        """Answers that the gateway's pods counted for the objective, and those within it."""
        names = ("lamina_gateway_judged_answers_total", "lamina_gateway_answers_within_objective_total")
        judged, within = (sum(metric(self.where, pod, name) for pod in self.gateway_pods()) for name in names)
        return judged, within

    def stage_pods(self) -> dict[str, int]:
        """Number of pods that are not terminating, by Service."""
        counts: dict[str, int] = {}
        for pod in pods(self.cluster, self.where, STAGES):
            service = pod["metadata"]["labels"][SERVICE]
            counts[service] = counts.get(service, 0) + 1
        return counts

    def stage_services(self, name: str = NAME) -> set[str]:
        names = {service["metadata"]["name"] for service in services_of(self.cluster, self.where.namespace, name)}
        return {name for name in names if name[:-1].endswith("-s")}


def store_secret(where: Settings) -> KubernetesObject:
    keys = {"AWS_ACCESS_KEY_ID": where.store.access_key_id, "AWS_SECRET_ACCESS_KEY": where.store.secret_access_key}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    metadata = {"name": "lamina-store", "namespace": where.namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}
