"""The life of a pipeline on a real cluster: `make test-cluster`. One scenario, in the order of this file.

SmolLM2 in fp32, in which replays and batches change no answer: every answer must equal the one that the same question got while
nothing else ran.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from eventing.wire.events import EventType
from knative.cluster.client import Ref
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError, DeployInProgress
from knative.cluster.lease import deploy_lease
from knative.cluster.pipeline_token import ensure_token
from knative.cluster.status import COLUMNS, cluster_status, status_rows
from knative.commands.model_choice import packaged_model
from knative.render.access import deployer_role
from knative.render.prune_script import is_ready
from knative.spec.model_shape import published_shape
from knative.spec.pipeline_spec import EventingSpec, GatewaySpec
from storage.models.model_repository import read_file
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.knative.real_cluster import (
    INSTANCE,
    MAX_TOKENS,
    MODEL,
    NAME,
    PROMPTS,
    SERVICE,
    STAGES,
    Probe,
    Scenario,
    as_deployer,
    drain,
    kill,
    missing,
    namespace,
    pods,
    settings,
    store_secret,
    wait_until,
)
from tests.support.paths import ROOT


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program} on the PATH")


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

OTHER: Final = "lamina-test-b"
LONG: Final = 160
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
    ("coordination.k8s.io/v1", "Lease"),
    ("eventing.knative.dev/v1", "Broker"),
    ("eventing.knative.dev/v1", "Trigger"),
    ("flows.knative.dev/v1", "Sequence"),
)


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
        steps.cluster.apply(store_secret(where))
        yield steps
        Probe(steps.cluster, where).remove()
        for name in (NAME, OTHER):
            steps.garbage.collect_all(name)


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


def test_24_streams_for_90_seconds_are_whole(scenario: Scenario) -> None:
    """Streams pass the ingress while stages scale out under them. Such streams once broke."""
    with scenario.streams.running(24) as streams:
        time.sleep(90)
    print(f"{streams.answers} streams")


def test_streams_outlive_stages_that_are_killed_drained_and_rolled(scenario: Scenario) -> None:
    """A pod of another stage each time, so that none is hit twice while it comes back."""
    stages = sorted(scenario.stage_services())
    with scenario.streams.running(8) as streams:
        for end, service in zip((kill, drain, kill), stages, strict=True):
            pod = next(each["metadata"]["name"] for each in pods(scenario.cluster, scenario.where, f"{SERVICE}={service}"))
            end(scenario.where, pod)
            answered = streams.answers
            wait_until(lambda answered=answered: streams.answers >= answered + 16, COLD_SECONDS, "answers behind it")
        scenario.deploy(log_level="warning")


def test_a_canary_gets_half_is_promoted_and_another_is_taken_back(scenario: Scenario) -> None:
    before = scenario.stage_services()
    with scenario.streams.running(6) as streams:
        scenario.deployer.canary(scenario.objects(scenario.spec(cut="0:15,15:30")), 50)
        assert len(scenario.stage_services()) == len(before) + 2
        status = cluster_status(scenario.cluster, scenario.where.namespace, NAME)
        shares = [row[COLUMNS.index("traffic")] for row in status_rows(status) if row[0] == NAME]
        assert sorted(shares)[-2:] == ["50 %", "50 %"], shares
        answered = streams.answers
        wait_until(lambda: streams.answers >= answered + 24, COLD_SECONDS, "answers of both")
        scenario.deployer.promote(NAME)
        promoted = scenario.stage_services()
        assert len(promoted) == 2, scenario.said
        scenario.deployer.canary(scenario.objects(scenario.spec()), 10)
        scenario.deployer.abort(NAME)
        assert scenario.stage_services() == promoted, scenario.said
        scenario.deployer.rollback(NAME)
        assert scenario.stage_services() == before, scenario.said


def test_a_deploy_that_fails_touches_nothing_and_is_rolled_back(scenario: Scenario) -> None:
    before = scenario.stage_services()
    impatient = Deployer(scenario.cluster, scenario.where.namespace, scenario.said.append, timeout_seconds=120)
    broken = scenario.spec(cut="0:15,15:30", image=f"{scenario.where.image}-that-is-nowhere")
    with scenario.streams.running(2):
        with pytest.raises(ClusterError):
            impatient.deploy(scenario.objects(broken))
        assert scenario.stage_services() >= before
        scenario.deployer.rollback(NAME)
    assert scenario.stage_services() == before, scenario.said


def test_a_pod_network_that_is_not_the_clusters_is_told_before_the_gateway_moves(scenario: Scenario) -> None:
    elsewhere = scenario.spec(gateway=GatewaySpec(pod_network="203.0.113.0/24"))
    with scenario.streams.running(2):
        with pytest.raises(ClusterError, match="pod_network"):
            scenario.deployer.deploy(scenario.objects(elsewhere))
        scenario.deployer.rollback(NAME)


def test_one_of_two_pipelines_in_a_namespace_is_deleted_and_the_other_goes_on(scenario: Scenario) -> None:
    url = scenario.deployer.deploy(scenario.objects(scenario.spec(name=OTHER, cut="0:30")))
    assert scenario.gateway_at(url).complete(PROMPTS[0], MAX_TOKENS) == scenario.expected[PROMPTS[0]]
    with scenario.streams.running(4):
        assert scenario.deployer.delete(OTHER) > 0
        time.sleep(10)
    assert scenario.stage_services(OTHER) == set()
    assert len(scenario.stage_services()) == 3


def test_a_token_is_rotated_under_load(scenario: Scenario) -> None:
    with scenario.streams.running(6):
        scenario.deployer.rotate_token(NAME)


def test_two_deploys_do_not_cross(scenario: Scenario) -> None:
    with (
        deploy_lease(scenario.cluster, scenario.where.namespace, NAME, scenario.said.append),
        pytest.raises(DeployInProgress, match="wait for its end"),
    ):
        scenario.deploy()
    scenario.deploy()


def test_the_rendered_role_is_enough_for_a_deployer(scenario: Scenario) -> None:
    """As a ServiceAccount that has that Role and nothing else."""
    with as_deployer(scenario.cluster, scenario.where, deployer_role(scenario.where.namespace)) as cluster:
        limited = Deployer(cluster, scenario.where.namespace, scenario.said.append, timeout_seconds=900)
        limited.deploy(scenario.objects(scenario.spec(log_level="debug")))
        limited.rollback(NAME)
        assert status_rows(cluster_status(cluster, scenario.where.namespace, NAME))


@needs("kubectl")
def test_kustomize_brings_a_pipeline_up_changes_it_and_its_job_prunes(scenario: Scenario, tmp_path: Path) -> None:
    """As a controller that applies a folder and prunes nothing that is annotated so."""
    spec, folder = scenario.spec(name=OTHER, cut="0:30"), tmp_path / "manifests"
    old = scenario.write_folder(folder, spec)
    ensure_token(scenario.cluster, scenario.objects(spec), scenario.said.append)
    gateway = scenario.gateway_at(_apply_folder(scenario, folder))
    assert gateway.complete(PROMPTS[0], MAX_TOKENS) == scenario.expected[PROMPTS[0]]
    new = scenario.write_folder(folder, msgspec.structs.replace(spec, cut="0:15,15:30"))
    _apply_folder(scenario, folder)
    wait_until(
        lambda: not scenario.stage_services(OTHER) & set(old.stage_names), 1000, "the Job prunes the stages of the first cut"
    )
    assert scenario.stage_services(OTHER) == set(new.stage_names)
    assert gateway.complete(PROMPTS[1], MAX_TOKENS) == scenario.expected[PROMPTS[1]]
    scenario.garbage.collect_all(OTHER)


def _apply_folder(scenario: Scenario, folder: Path) -> str:
    """The gateway's URL once it is Ready."""
    context = [] if scenario.where.context is None else ["--context", scenario.where.context]
    command = ["kubectl", "--kubeconfig", scenario.where.kubeconfig, *context, "apply", "--kustomize", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    gateway = Ref("serving.knative.dev/v1", "Service", scenario.where.namespace, OTHER)
    wait_until(lambda: is_ready(scenario.cluster.get(gateway)), COLD_SECONDS, "the gateway is Ready")
    live = scenario.cluster.get(gateway)
    assert live is not None
    url: str = live["status"]["url"]
    return url


@needs("kn")
def test_kn_lamina_is_the_command_line(scenario: Scenario) -> None:
    """kn finds `kn-lamina` on the PATH."""
    environ = os.environ | {"PATH": f"{ROOT}:{os.environ['PATH']}", "KUBECONFIG": scenario.where.kubeconfig}
    context = [] if scenario.where.context is None else ["--context", scenario.where.context]
    command = ["kn", "lamina", "status", NAME, "--namespace", scenario.where.namespace, *context]
    shown = subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=120).stdout
    assert all(service in shown for service in scenario.stage_services()), shown


def test_a_text_is_scored_through_the_sequence(scenario: Scenario) -> None:
    if not scenario.cluster.serves("eventing.knative.dev/v1", "Broker"):
        pytest.skip("Knative Eventing is not installed on this cluster")
    probe = Probe(scenario.cluster, scenario.where)
    scenario.deploy(eventing=EventingSpec(dead_letter_sink=probe.sink, reply_sink=probe.sink))
    # Done means Ready: what is sent now is not lost.
    (broker,) = scenario.cluster.find("eventing.knative.dev/v1", "Broker", scenario.where.namespace, INSTANCE)
    address = broker["status"]["address"]["url"]
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
    assert scenario.deployer.delete(NAME) > 0

    def left() -> list[str]:
        return [
            f"{kind} {each['metadata']['name']}"
            for api_version, kind in NOTHING_MAY_BE_LEFT
            if scenario.cluster.serves(api_version, kind)
            for each in scenario.cluster.find(api_version, kind, scenario.where.namespace, INSTANCE)
        ]

    # What Knative made of it is collected in the background, Revisions some time after the last pod.
    wait_until(lambda: left() == [], 900, "nothing left of the pipeline")
