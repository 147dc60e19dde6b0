"""The life of a pipeline on a real cluster: `make test-cluster`. One scenario, in the order of this file.

SmolLM2 in fp32, where a replayed or batched answer is never a different one: what is expected of every answer is what the same
question got while nothing else ran.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from eventing.wire.events import EventType
from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.garbage import GarbageCollector
from knative.cluster.status import services_of
from knative.render.rendering import render, resolve
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.model_shape import ModelShape, published_shape
from knative.spec.model_sources import packaged_model
from knative.spec.pipeline_spec import Autoscaling, Eventing, Model, PipelineSpec, Resources, Stage, Store
from storage.models.model_repository import ModelManifest, read_file
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.knative.real_cluster import (
    Conversations,
    Gateway,
    Probe,
    Settings,
    kill,
    missing,
    namespace,
    pods,
    settings,
    wait_until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

NAME: Final = "lamina-test"
MODEL: Final = "lamina-test-smollm2"
INSTANCE: Final = f"app.kubernetes.io/instance={NAME}"
STAGES: Final = f"{INSTANCE},app.kubernetes.io/component=stage"
SERVICE: Final = "serving.knative.dev/service"
MAX_TOKENS: Final = 48
LONG: Final = 160
PROMPTS: Final = ("The capital of France is", "Once upon a time", "Water is made of", "A prime number is")
TEXT: Final = "The capital of France is Paris, and the capital of Italy is Rome."
COLD_SECONDS: Final = 600
NOTHING_MAY_BE_LEFT: Final = (
    ("serving.knative.dev/v1", "Service"),
    ("serving.knative.dev/v1", "Revision"),
    ("apps/v1", "Deployment"),
    ("v1", "Pod"),
    ("v1", "Secret"),
    ("v1", "ConfigMap"),
    ("v1", "ServiceAccount"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("eventing.knative.dev/v1", "Broker"),
    ("eventing.knative.dev/v1", "Trigger"),
    ("flows.knative.dev/v1", "Sequence"),
)


class Scenario:
    """What the steps share."""

    def __init__(self, where: Settings, publication: ModelManifest, shape: ModelShape, tokenizer: Tokenizer) -> None:
        self.where = where
        self.tokenizer = tokenizer
        self.said: list[str] = []
        self.cluster = Cluster.connect(where.kubeconfig, where.context)
        self.deployer = Deployer(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.garbage = GarbageCollector(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.expected: dict[str, str] = {}
        self._publication = publication
        self._shape = shape
        self._gateway: Gateway | None = None

    @property
    def gateway(self) -> Gateway:
        assert self._gateway is not None, "nothing was deployed: an earlier step failed"
        return self._gateway

    @property
    def conversations(self) -> Conversations:
        return Conversations(self.gateway, {prompt: self.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS)

    def spec(self, **changes: Any) -> PipelineSpec:
        spec = PipelineSpec(
            name=NAME,
            namespace=self.where.namespace,
            model=Model(name=MODEL, dtype="float32"),
            cut="0:10,10:20,20:30",
            image=self.where.image,
            stage=Stage(resources=Resources(cpu="1", memory="2Gi"), kv_cache="256Mi", autoscaling=Autoscaling(max_scale=3)),
            store=Store(endpoint=self.where.store_endpoint, bucket=self.where.store.bucket, region=self.where.store.region),
        )
        return msgspec.structs.replace(spec, **changes)

    def objects(self, spec: PipelineSpec) -> list[KubernetesObject]:
        pipeline = resolve(spec, lambda: (self._publication, self._shape))
        return [each for rendered in render(pipeline).values() for each in rendered]

    def deploy(self, **changes: Any) -> None:
        url = self.deployer.deploy(self.objects(self.spec(**changes)))
        self._gateway = Gateway(url, self.where.ingress, MODEL)

    def stage_pods(self) -> dict[str, int]:
        """Pods that stay, by Service."""
        counts: dict[str, int] = {}
        for pod in pods(self.cluster, self.where, STAGES):
            service = pod["metadata"]["labels"][SERVICE]
            counts[service] = counts.get(service, 0) + 1
        return counts

    def stage_services(self) -> set[str]:
        names = {service["metadata"]["name"] for service in services_of(self.cluster, self.where.namespace, NAME)}
        return {name for name in names if name[:-1].endswith("-s")}


@pytest.fixture(scope="module")
def scenario() -> Iterator[Scenario]:
    if missing():
        pytest.skip(f"needs a real cluster; set {', '.join(missing())} (meanings: tests/support/knative/real_cluster.py)")
    where = settings()
    store = ObjectStore(where.store)
    publication = publish(packaged_model(), store, MODEL, "float32")
    with namespace(where):
        tokenizer = Tokenizer.from_str(read_file(store, publication, "tokenizer.json").decode())
        steps = Scenario(where, publication, published_shape(store, publication), tokenizer)
        steps.cluster.apply(_store_secret(where))
        yield steps
        Probe(steps.cluster, where).remove()
        steps.garbage.collect_all(NAME)


def _store_secret(where: Settings) -> KubernetesObject:
    keys = {"AWS_ACCESS_KEY_ID": where.store.access_key_id, "AWS_SECRET_ACCESS_KEY": where.store.secret_access_key}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    metadata = {"name": "lamina-store", "namespace": where.namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}


def test_a_pipeline_is_deployed_and_answers(scenario: Scenario) -> None:
    scenario.deploy()
    for prompt in PROMPTS:
        scenario.expected[prompt] = scenario.gateway.complete(prompt, MAX_TOKENS)
    assert "Paris" in scenario.expected[PROMPTS[0]]
    assert len(scenario.stage_services()) == 3


def test_deploying_the_same_again_changes_nothing(scenario: Scenario) -> None:
    assert list(scenario.deployer.diff(scenario.objects(scenario.spec()))) == []


def test_many_conversations_scale_it_out(scenario: Scenario) -> None:
    """And every answer is the one that it was alone."""
    with scenario.conversations.running(24):
        wait_until(lambda: max(scenario.stage_pods().values(), default=0) >= 2, 180, "a stage with two pods")


def test_without_traffic_it_goes_to_zero(scenario: Scenario) -> None:
    wait_until(lambda: not pods(scenario.cluster, scenario.where, INSTANCE), 400, "no pod of the pipeline")


def test_asked_again_it_wakes_up(scenario: Scenario) -> None:
    assert scenario.gateway.complete(PROMPTS[1], MAX_TOKENS) == scenario.expected[PROMPTS[1]]
    assert all(count >= 1 for count in scenario.stage_pods().values())


def test_a_new_revision_loses_no_answer(scenario: Scenario) -> None:
    """The same pipeline with other settings: the same Services, rolled by Knative."""
    before = scenario.stage_services()
    with scenario.conversations.running(6):
        scenario.deploy(log_level="debug")
    assert scenario.stage_services() == before


def test_another_cut_goes_out_beside_it_and_back_again(scenario: Scenario) -> None:
    before = scenario.stage_services()
    with scenario.conversations.running(6) as conversations:
        scenario.deploy(cut="0:15,15:30")
        assert len(scenario.stage_services()) == 2, scenario.said
        assert not scenario.stage_services() & before
        answered = conversations.answers
        wait_until(lambda: conversations.answers > answered, COLD_SECONDS, "an answer from the new stages")
        scenario.deployer.rollback(NAME)
        assert scenario.stage_services() == before, scenario.said


def test_a_stage_killed_in_mid_answer_costs_a_pause(scenario: Scenario) -> None:
    """All pods of the middle stage, without a drain: keys and values of the answer are gone there."""
    expected = scenario.gateway.complete(PROMPTS[1], LONG)
    stage = sorted(scenario.stage_services())[1]
    killed: list[str] = []
    text = ""
    for piece in scenario.gateway.stream(PROMPTS[1], LONG):
        text += piece
        if text and not killed:
            killed = [pod["metadata"]["name"] for pod in pods(scenario.cluster, scenario.where, f"{SERVICE}={stage}")]
            for pod in killed:
                kill(scenario.where, pod)
    assert killed
    assert text == expected
    assert not set(killed) & {pod["metadata"]["name"] for pod in pods(scenario.cluster, scenario.where, STAGES)}


def test_a_text_is_scored_through_the_sequence(scenario: Scenario) -> None:
    if not scenario.cluster.serves("eventing.knative.dev/v1", "Broker"):
        pytest.skip("Knative Eventing is not installed on this cluster")
    probe = Probe(scenario.cluster, scenario.where)
    scenario.deploy(eventing=Eventing(dead_letter_sink=probe.sink, reply_sink=probe.sink))
    address = ""

    def broker_is_there() -> bool:
        nonlocal address
        (broker,) = scenario.cluster.find("eventing.knative.dev/v1", "Broker", scenario.where.namespace, INSTANCE)
        address = (broker.get("status") or {}).get("address", {}).get("url", "")
        return bool(address)

    wait_until(broker_is_there, 120, "an address of the Broker")
    event = {"id": "score-1", "type": str(EventType.SCORE_REQUEST), "data": {"text": TEXT}}
    answers = probe.ask(address, event)
    (answer,) = answers.values()  # delivered twice, answered with one id
    assert answer["type"] == EventType.SCORE_RESPONSE, answer
    token_ids: list[int] = scenario.tokenizer.encode(TEXT).ids
    assert answer["data"]["token_ids"] == token_ids
    assert answer["data"]["logprobs"] == pytest.approx(_whole_model_logprobs(token_ids), abs=1e-3)


def _whole_model_logprobs(token_ids: list[int]) -> list[float]:
    file = Path(packaged_model())
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    chosen = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    numbers: list[float] = chosen.tolist()
    return numbers


def test_undeployed_nothing_is_left(scenario: Scenario) -> None:
    assert scenario.garbage.collect_all(NAME) > 0
    wait_until(lambda: not scenario.cluster.find("v1", "Pod", scenario.where.namespace, INSTANCE), 700, "no pod")
    left = [
        f"{kind} {each['metadata']['name']}"
        for api_version, kind in NOTHING_MAY_BE_LEFT
        if scenario.cluster.serves(api_version, kind)
        for each in scenario.cluster.find(api_version, kind, scenario.where.namespace, INSTANCE)
    ]
    assert left == []
