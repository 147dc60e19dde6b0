"""The life of a pipeline on a real cluster: `make test-cluster`. One scenario, in the order of this file.

SmolLM2 in fp32, in which replays and batches change no answer: every answer must equal the one that the same question got while
nothing else ran.
"""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from eventing.wire.control import LEASE_SECONDS
from eventing.wire.events import EventType
from functions.configuration.api_keys import ApiKey, sha256_of
from functions.configuration.config import FLEET_LABEL
from knative.cluster.client import Ref
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError, DeployInProgress
from knative.cluster.lease import deploy_lease
from knative.cluster.pipeline_token import ensure_token
from knative.cluster.status import COLUMNS, cluster_status, status_rows
from knative.commands.fleet import fleet_status
from knative.commands.model_choice import packaged_model
from knative.render.access import deployer_role
from knative.render.prune_script import is_ready
from knative.spec.objective import ObjectiveSpec
from knative.spec.pipeline_spec import (
    KEYS_ENTRY,
    Autoscaling,
    EventingSpec,
    GatewayAutoscaling,
    GatewaySpec,
    ModelSpec,
    NetworkSpec,
)
from storage.models.adapter_publisher import publish_adapter
from storage.models.model_repository import read_file
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.knative.cluster_streams import EventStreams, RetryingClients
from tests.support.knative.real_cluster import (
    FLEET,
    INSTANCE,
    MAX_TOKENS,
    MODEL,
    NAME,
    PROMPTS,
    SERVICE,
    STAGES,
    Conversations,
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
from tests.support.storage.adapters import adapted, saved
from tests.support.storage.published import save_checkpoint


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program} on the PATH")


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

OTHER: Final = "lamina-test-b"
TINY: Final = "lamina-test-tiny"  # another model
ONE: Final = "lamina-test-one"  # members of a fleet
TWO: Final = "lamina-test-two"
API_KEYS: Final = "lamina-test-api-keys"
LINES: Final = 60
CHANGE_SECONDS: Final = 300  # within which a change is done, under load; a rotation of the token is three
CLIENTS: Final = 24
KILL_SECONDS: Final = 20
GROWN_SECONDS: Final = 10  # between the first and the last stage's second pod, if all are shown to lack one at once
BREAK_SECONDS: Final = 15  # after a kill: within it its streams have broken, and the ingress knows that the pod is gone
HPA: Final = Autoscaling(autoscaler_class="hpa", min_scale=1, max_scale=2)
GATEWAY_HPA: Final = GatewayAutoscaling(autoscaler_class="hpa", min_scale=1, max_scale=2)
LONG: Final = 160
TEXT: Final = "The capital of France is Paris, and the capital of Italy is Rome."
COLD_SECONDS: Final = 600
NOTHING_MAY_BE_LEFT: Final = (
    ("serving.knative.dev/v1", "Service"), ("serving.knative.dev/v1", "Revision"), ("apps/v1", "Deployment"), ("v1", "Pod"),
    ("v1", "Secret"), ("v1", "ConfigMap"), ("v1", "ServiceAccount"), ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"), ("networking.k8s.io/v1", "NetworkPolicy"),
    ("coordination.k8s.io/v1", "Lease"), ("eventing.knative.dev/v1", "Broker"), ("eventing.knative.dev/v1", "Trigger"),
    ("flows.knative.dev/v1", "Sequence"),
)  # fmt: skip


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    if missing():
        pytest.skip(f"needs a real cluster; set {', '.join(missing())} (meanings: tests/support/knative/real_cluster.py)")
    where = settings()
    store = ObjectStore(where.store)
    tiny = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(tiny)
    publications = [publish(packaged_model(), store, MODEL, dtype) for dtype in ("float32", "bfloat16")]
    with namespace(where):
        tokenizer = Tokenizer.from_str(read_file(store, publications[0], "tokenizer.json").decode())
        steps = Scenario(where, store, [*publications, publish(tiny, store, TINY, "float32")], tokenizer)
        steps.cluster.apply(store_secret(where))
        yield steps
        Probe(steps.cluster, where).remove()
        steps.cluster.delete(Ref("v1", "Secret", where.namespace, API_KEYS))
        for name in (NAME, OTHER, ONE, TWO, FLEET):
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


def test_prompts_that_wait_bring_pods_to_all_stages_at_once_and_a_scale_in_costs_no_answer(scenario: Scenario) -> None:
    """With an objective that long prompts miss. Afterwards one conversation goes on while the youngest pods leave."""
    objective = ObjectiveSpec(first_token_seconds=0.2, token_seconds=1.0)
    scenario.deploy(objective=objective)
    long = [f"{number}. " + PROMPTS[0] + " and so on" * 300 for number in range(CLIENTS)]
    grown: dict[str, float] = {}

    def all_have_two() -> bool:
        for stage, count in scenario.stage_pods().items():
            if count >= 2:
                grown.setdefault(stage, time.monotonic())
        return len(grown) == 3

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(scenario.gateway.complete, prompt, MAX_TOKENS) for prompt in long for _ in range(3)]
        wait_until(all_have_two, 180, "two pods of every stage")
        assert max(grown.values()) - min(grown.values()) <= GROWN_SECONDS
        for answer in answers:
            answer.result()
    judged, within = scenario.judged_answers()
    assert judged >= len(answers) > within
    with scenario.conversations.running(1):
        wait_until(lambda: set(scenario.stage_pods().values()) == {1}, 300, "one pod of every stage")
    scenario.deploy()


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


def test_a_rollback_right_after_promote_waits_for_what_kubernetes_still_deletes(scenario: Scenario) -> None:
    """A new Service was NotOwned beside the Route of the deleted one of its name."""
    before = scenario.stage_services()
    with scenario.streams.running(6):
        for _ in range(3):
            scenario.deployer.canary(scenario.objects(scenario.spec(cut="0:15,15:30")), 50)
            scenario.deployer.promote(NAME)
            scenario.deployer.rollback(NAME)
            assert scenario.stage_services() == before, scenario.said
    for service in before:
        ref = Ref("serving.knative.dev/v1", "Configuration", scenario.where.namespace, service)
        configuration = scenario.cluster.get(ref)
        assert configuration is not None
        revisions = scenario.cluster.find(ref.api_version, "Revision", ref.namespace, f"{SERVICE}={service}")
        owners = {each["metadata"]["ownerReferences"][0]["uid"] for each in revisions}
        assert owners == {configuration["metadata"]["uid"]}, "a Revision of the deleted Service is in use"


def test_a_revision_that_fails_in_its_own_service_is_deleted_by_the_rollback(scenario: Scenario) -> None:
    """Its pods stayed in ImagePullBackOff for eleven minutes."""
    impatient = Deployer(scenario.cluster, scenario.where.namespace, scenario.said.append, timeout_seconds=120)
    with scenario.streams.running(2):
        with pytest.raises(ClusterError):
            impatient.deploy(scenario.objects(scenario.spec(image=f"{scenario.where.image}-that-is-nowhere")))
        assert "ImagePull" in str(pods(scenario.cluster, scenario.where, INSTANCE))
        scenario.deployer.rollback(NAME)
        wait_until(lambda: "ImagePull" not in str(pods(scenario.cluster, scenario.where, INSTANCE)), 60, "no such pod")
    assert any(line.startswith("deleted Revision ") and "is not Ready" in line for line in scenario.said), scenario.said


def test_class_hpa_keeps_no_pod_of_old_revisions(scenario: Scenario) -> None:
    """Neither after other settings nor after another cut."""
    if not scenario.has_hpa():
        pytest.skip("Knative's HPA extension or a metrics server is not installed on this cluster")
    base = scenario.spec(name=OTHER, cut="0:30")
    spec = msgspec.structs.replace(
        base, stage=msgspec.structs.replace(base.stage, autoscaling=HPA), gateway=GatewaySpec(autoscaling=GATEWAY_HPA)
    )
    for change in ({}, {"log_level": "debug"}, {"cut": "0:15,15:30"}):
        spec = msgspec.structs.replace(spec, **change)
        scenario.deployer.deploy(scenario.objects(spec))
        wait_until(lambda: scenario.replaced_revisions(OTHER) == set(), 30, "old revisions are deleted")
    assert len(scenario.stage_services(OTHER)) == 2
    scenario.deployer.delete(OTHER)


@pytest.mark.timeout(4 * 3600)
def test_everything_is_changed_and_rolled_back_under_24_streams(scenario: Scenario) -> None:
    """No stream breaks, no answer mixes two versions, and each change is done in time."""
    scenario.deploy()
    changes: dict[str, dict[str, Any] | None] = {
        "image": {"image": scenario.where.other_image},
        "dtype": {"model": ModelSpec(name=MODEL, dtype="bfloat16")},
        "cut": {"cut": "0:15,15:30"},
        "model": {"model": ModelSpec(name=TINY, dtype="float32"), "cut": "0:2,2:4,4:6"},
        "token": None,
        "keys": {"gateway": GatewaySpec(api_keys_secret=API_KEYS)},
        "limits": {"gateway": GatewaySpec(client_requests_per_minute=100_000, client_max_tokens=1000)},
        "number of gateways": {"gateway": GatewaySpec(autoscaling=GatewayAutoscaling(min_scale=2))},
    }
    if scenario.where.other_image is None:
        del changes["image"]
    api_key = "lamina-test-key"
    text = base64.b64encode(f"{ApiKey(sha256_of(api_key), 'test').written()}\n".encode()).decode()
    metadata = {"name": API_KEYS, "namespace": scenario.where.namespace}
    scenario.cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {KEYS_ENTRY: text}})
    versions = {name: _answers_of(scenario, changes[name] or {}, api_key) for name in ("dtype", "model")}
    usual = _answers_of(scenario, {}, api_key)
    streams = _streams(scenario, scenario.gateway.url, api_key, [usual, *versions.values()])
    table = []
    with streams.running(CLIENTS):
        for name, change in changes.items():
            began, breaks = time.monotonic(), len(streams.broken)
            if change is None:
                scenario.deployer.rotate_token(NAME)
            else:
                scenario.deploy(**change)
            changed = time.monotonic()
            _answer_as(streams, versions.get(name, usual))
            again = time.monotonic()
            if change is None:
                scenario.deployer.rotate_token(NAME)
            else:
                scenario.deployer.rollback(NAME)
            back = time.monotonic()
            _answer_as(streams, usual)
            table.append((name, changed - began, back - again, len(streams.answers), len(streams.broken) - breaks))
            print("{:20} {:4.0f} s, back in {:4.0f} s, {:5} streams so far, {} broken".format(*table[-1]))
    assert streams.broken == []
    assert streams.wrong() == []
    most = {name: 3 * CHANGE_SECONDS if change is None else CHANGE_SECONDS for name, change in changes.items()}
    assert [row for row in table if max(row[1:3]) > most[row[0]]] == []


def _streams(scenario: Scenario, url: str, api_key: str, versions: list[dict[str, str]]) -> EventStreams:
    ingress = scenario.where.ingress
    allowed = {prompt: {answers[prompt] for answers in versions} for prompt in PROMPTS} if versions else {}
    return EventStreams(ingress or url, urlsplit(url).netloc if ingress else None, api_key, allowed)


def _answers_of(scenario: Scenario, changes: dict[str, Any], api_key: str) -> dict[str, str]:
    """The answers of a pipeline that nothing disturbs, which is deleted again."""
    url = scenario.deployer.deploy(scenario.objects(scenario.spec(name=OTHER, **changes)))
    streams = _streams(scenario, url, api_key, [])
    answers = {prompt: asyncio.run(streams.ask(prompt)) for prompt in PROMPTS}
    scenario.deployer.delete(OTHER)
    return answers


def _answer_as(streams: EventStreams, expected: dict[str, str]) -> None:
    """Waits for two answers of each client; the last of them are those of the version that serves now."""
    answered = len(streams.answers)
    wait_until(lambda: len(streams.answers) >= answered + 2 * CLIENTS, COLD_SECONDS, "answers after the change")
    for prompt, text in streams.answers[answered + CLIENTS : answered + 2 * CLIENTS]:
        assert text == expected[prompt]


@pytest.mark.timeout(3600)
def test_gateways_that_are_killed_break_their_own_streams_only(scenario: Scenario) -> None:
    """Two gateways, one killed every 20 s. Clients that ask again with their key get the answer that they began."""
    two = GatewaySpec(autoscaling=GatewayAutoscaling(min_scale=2, max_scale=2))
    scenario.deploy(gateway=two, network=NetworkSpec(policies=False))  # so that the API server may read metrics of pods
    wait_until(lambda: len(scenario.gateway_pods()) == 2, 120, "two gateways")
    repeated = [scenario.gateway.complete(PROMPTS[1], MAX_TOKENS, temperature=0.9, key="a question") for _ in range(6)]
    assert len(set(repeated)) == 1, "the seed follows from the key, at every gateway"
    clients = RetryingClients(scenario.gateway, {prompt: scenario.expected[prompt] for prompt in PROMPTS})
    kills = []
    with clients.running(CLIENTS):
        for _ in range(3):
            wait_until(lambda: len(scenario.gateway_pods()) == 2, 120, "two gateways")
            time.sleep(KILL_SECONDS)
            kill(scenario.where, scenario.gateway_pods()[0])
            kills.append(time.monotonic())
        answered = clients.answers
        wait_until(lambda: clients.answers >= answered + CLIENTS, COLD_SECONDS, "answers after the last kill")
    print(f"{clients.answers} answers, {len(clients.broken_at)} broken streams")
    for each in clients.broken_at:
        assert any(0 <= each - at <= BREAK_SECONDS for at in kills), "a stream broke although its gateway lived"
    assert clients.broken_at, "no stream was at a killed gateway"
    wait_until(lambda: scenario.held_sequences() == 0, LEASE_SECONDS + 60, "stages free what the killed gateways held")
    scenario.deploy()


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
    if scenario.has_hpa():  # the settings change, and the Job with them
        for level in ("info", "debug"):
            stage = msgspec.structs.replace(spec.stage, autoscaling=HPA)
            scenario.write_folder(folder, msgspec.structs.replace(spec, cut="0:15,15:30", log_level=level, stage=stage))
            _apply_folder(scenario, folder)
            wait_until(lambda: scenario.has_only_new_pods(OTHER), 1000, "the Job deletes old revisions of class hpa")
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


def test_an_adapter_is_chosen_by_name_while_a_stage_is_killed(scenario: Scenario, tmp_path: Path) -> None:
    publish_adapter(scenario.store, MODEL, "random", saved(adapted(_whole_model(), 1, r=8), tmp_path))
    scenario.deploy(adapters=4)
    own = scenario.gateway.complete(PROMPTS[1], LONG)
    gateway = replace(scenario.gateway, model=f"{MODEL}:random")
    expected = gateway.complete(PROMPTS[1], LONG)
    assert expected != own
    pieces: list[str] = []
    for piece in gateway.stream(PROMPTS[1], LONG):
        if not pieces:
            stage = sorted(scenario.stage_services())[1]
            for pod in pods(scenario.cluster, scenario.where, f"{SERVICE}={stage}"):
                kill(scenario.where, pod["metadata"]["name"])
        pieces.append(piece)
    assert "".join(pieces) == expected
    assert scenario.gateway.complete(PROMPTS[1], LONG) == own


def test_a_batch_outlives_a_gateway_and_a_stage(scenario: Scenario) -> None:
    """Each line is answered once, as it was alone."""
    scenario.deploy(gateway=GatewaySpec(jobs=NAME))
    asked = {f"{number}": PROMPTS[number % len(PROMPTS)] for number in range(LINES)}
    bodies = {
        id: {"model": MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0} for id, prompt in asked.items()
    }
    lines = [json.dumps({"custom_id": id, "url": "/v1/completions", "body": body}) for id, body in bodies.items()]
    with scenario.gateway.api() as client:
        file = client.post("/files", files={"file": ("input.jsonl", "\n".join(lines))}, data={"purpose": "batch"}).json()
        batch = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        id_ = client.post("/batches", json=batch).raise_for_status().json()["id"]
        stage = pods(scenario.cluster, scenario.where, f"{SERVICE}={sorted(scenario.stage_services())[1]}")
        for pod in (*scenario.gateway_pods()[:1], *(each["metadata"]["name"] for each in stage)):
            kill(scenario.where, pod)
        found: dict[str, Any] = {}

        def completed() -> bool:
            with suppress(httpx.TransportError, ValueError):  # no gateway answers for a while
                found.update(client.get(f"/batches/{id_}").json())
            return found.get("status") == "completed"

        wait_until(completed, COLD_SECONDS, "the end of the batch")
        output = client.get(f"/files/{found['output_file_id']}/content").raise_for_status().text
    answered = [json.loads(line) for line in output.splitlines()]
    assert sorted(each["custom_id"] for each in answered) == sorted(asked)
    for each in answered:
        assert each["response"]["body"]["choices"][0]["text"] == scenario.expected[asked[each["custom_id"]]]


def test_a_fleet_of_two_wakes_changes_a_member_and_is_deleted(scenario: Scenario, tmp_path: Path) -> None:
    members = {
        ONE: {"model": {"name": MODEL, "dtype": "float32"}, "cut": "0:15,15:30"},
        TWO: {"model": {"name": TINY, "dtype": "float32"}, "cut": "0:3,3:6"},
    }
    gateway = scenario.deploy_fleet(tmp_path, members)
    with gateway.api() as client:
        assert {each["id"] for each in client.get("/models").json()["data"]} == {MODEL, TINY}
    tiny = replace(gateway, model=TINY)
    assert gateway.complete(PROMPTS[0], MAX_TOKENS) == scenario.expected[PROMPTS[0]]
    expected = tiny.complete(PROMPTS[0], MAX_TOKENS)
    status = fleet_status(scenario.cluster, scenario.where.namespace, FLEET)
    assert {each["name"]: each["stages"] for each in status["members"]} == {ONE: 2, TWO: 2}
    assert all(each["pods"] for each in status["members"])

    before = {name: scenario.stage_services(name) for name in members}
    conversations = Conversations(gateway, {prompt: scenario.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS)
    with conversations.running(2):
        members[TWO]["cut"] = "0:2,2:4,4:6"
        scenario.deploy_fleet(tmp_path, members)
        assert tiny.complete(PROMPTS[0], MAX_TOKENS) == expected
    assert scenario.stage_services(ONE) == before[ONE]
    assert len(scenario.stage_services(TWO) - before[TWO]) == 3

    stages = f"{FLEET_LABEL}={FLEET},app.kubernetes.io/component=stage"
    wait_until(lambda: not pods(scenario.cluster, scenario.where, stages), 400, "all members at zero")
    assert tiny.complete(PROMPTS[0], MAX_TOKENS) == expected
    assert not pods(scenario.cluster, scenario.where, f"{stages},app.kubernetes.io/instance={ONE}"), "the other stays at zero"
    scenario.delete_fleet()
    assert not scenario.cluster.find("serving.knative.dev/v1", "Service", scenario.where.namespace, f"{FLEET_LABEL}={FLEET}")


def _whole_model() -> Any:
    file = Path(packaged_model())
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def _whole_model_logprobs(token_ids: list[int]) -> list[float]:
    model = _whole_model()
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
