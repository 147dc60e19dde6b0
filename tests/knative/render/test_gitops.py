"""Manifests for GitOps: kustomization, sync waves, prune protection, and the Job that prunes instead."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from knative.__main__ import main
from knative.cluster.client import Ref
from knative.render.gitops import for_gitops, prune_objects
from knative.render.prune_script import NamespaceApi, is_ready, prune_fleet
from knative.render.rendering import render
from knative.webhook.check import is_knative_service, validate, warnings
from tests.support.functions.functions import wait_until
from tests.support.knative.knative_controllers import image_pull_fails
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.manifests import (
    DIGEST,
    OTHER_DIGEST,
    fleet_document,
    member_document,
    objects,
    rendered_folder,
    resolved_pipeline,
    resource,
    stage_name,
)
from tests.support.knative.site import Site

ARGO = "argocd.argoproj.io/"
EVENTING = {"dead_letter_sink": "http://sink.example", "reply_sink": "http://sink.example"}


def written(out: Path) -> list[dict[str, Any]]:
    (names,) = yaml.safe_load_all((out / "kustomization.yaml").read_text())
    return [each for name in names["resources"] for each in yaml.safe_load_all((out / name).read_text())]


def test_the_kustomization_names_every_other_file(tmp_path: Path) -> None:
    out = rendered_folder(tmp_path, "--gitops", eventing=EVENTING)
    named = set(yaml.safe_load((out / "kustomization.yaml").read_text())["resources"])
    assert named | {"kustomization.yaml"} == {path.name for path in out.iterdir()}
    assert "prune.yaml" in named


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl (Debian: kubernetes-client)")
@pytest.mark.parametrize("gitops", [(), ("--gitops",)])
def test_kubectl_kustomize_returns_the_rendered_objects(tmp_path: Path, gitops: tuple[str, ...]) -> None:
    out = rendered_folder(tmp_path, *gitops, eventing=EVENTING)
    built = subprocess.run(["kubectl", "kustomize", str(out)], capture_output=True, text=True, timeout=240, check=True).stdout
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built)}
    assert by_name == {(each["kind"], each["metadata"]["name"]): each for each in written(out)}


def test_without_gitops_nothing_is_annotated(tmp_path: Path) -> None:
    assert all(
        ARGO not in key for each in written(rendered_folder(tmp_path)) for key in each["metadata"].get("annotations", {})
    )


def test_stages_come_before_the_gateway_and_eventing_after_it(tmp_path: Path) -> None:
    waves = {
        f"{each['kind']} {each['metadata']['name']}": int(each["metadata"]["annotations"][ARGO + "sync-wave"])
        for each in written(rendered_folder(tmp_path, "--gitops", eventing=EVENTING))
        if ARGO + "sync-wave" in each["metadata"].get("annotations", {})
    }
    found = [wave for name, wave in waves.items() if name[:-1].endswith("-s")]
    assert len(found) == 3
    assert max(found) < waves["Service chat"] < min(waves["Broker chat"], waves["Trigger chat-generate"])


def test_objects_named_by_fingerprint_are_protected_from_pruning(tmp_path: Path) -> None:
    found = written(rendered_folder(tmp_path, "--gitops", eventing=EVENTING))
    kept = {each["metadata"]["name"] for each in found if "Prune=false" in _option(each)}
    fingerprint = resolved_pipeline().fingerprint[:8]
    assert kept == {f"chat-{fingerprint}{end}" for end in ("-s0", "-s1", "-s2", "-ev", "")}
    assert all(each["metadata"]["annotations"]["kustomize.toolkit.fluxcd.io/prune"] for each in found if _option(each))


def _option(manifest: dict[str, Any]) -> str:
    option: str = manifest["metadata"].get("annotations", {}).get(ARGO + "sync-options", "")
    return option


def test_annotations_are_valid_and_make_no_new_revision() -> None:
    pipeline = resolved_pipeline()
    plain, marked = render(pipeline), for_gitops(pipeline, render(pipeline))
    for name, found in plain.items():
        for before, after in zip(found, marked[name], strict=True):
            if is_knative_service(after):
                assert (validate(after), warnings(after)) == ([], [])
                assert after["spec"] == before["spec"]


def test_the_jobs_pod_is_placed_like_a_gateways() -> None:
    pod = {"node_selector": {"pool": "system"}, "image_pull_secrets": ["pull"], "affinity": {"podAntiAffinity": {}}}
    (job,) = (each for each in prune_objects(resolved_pipeline(gateway={"pod": pod})) if each["kind"] == "Job")
    spec = job["spec"]["template"]["spec"]
    assert (spec["nodeSelector"], spec["imagePullSecrets"]) == ({"pool": "system"}, [{"name": "pull"}])
    assert "affinity" not in spec


@pytest.fixture
def api(site: Site) -> KubernetesApi:
    """A cluster on which the pipeline was replaced as a controller does it: everything applied, nothing pruned."""
    gateway = Ref("serving.knative.dev/v1", "Service", "default", "chat")
    for digest in (DIGEST, OTHER_DIGEST):
        for each in objects(digest):
            site.cluster.apply(each, force=True)
        wait_until(lambda: is_ready(site.cluster.get(gateway)))
    return site.api


def stages(api: KubernetesApi, digest: str) -> set[str]:
    names = set(resolved_pipeline(digest).stage_names)
    return {name for name in api.named("services") if name in names}


def start_job(api: KubernetesApi, digest: str, seconds: float = 20, **changes: Any) -> "subprocess.Popen[str]":
    """Runs the command of the rendered Job against the stand-in."""
    (job,) = (each for each in prune_objects(resolved_pipeline(digest, **changes)) if each["kind"] == "Job")
    _, *command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    command = [sys.executable, *command[:-1], str(seconds), api.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def put_old_gateway(api: KubernetesApi, phase: str) -> None:
    """A pod of the gateway that was replaced."""
    labels = next(each for each in objects(DIGEST) if each["metadata"]["name"] == "chat")["metadata"]["labels"]
    api.put(resource("Pod", "old", labels=labels, status={"phase": phase}))


def test_the_job_deletes_the_old_stages_and_nothing_else(api: KubernetesApi) -> None:
    before = set(api.named("services"))
    with start_job(api, OTHER_DIGEST) as job:
        assert job.wait(60) == 0
    assert before - set(api.named("services")) == set(resolved_pipeline(DIGEST).stage_names)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [{"class": "hpa", "min_scale": 1}, {}], ids=["class hpa", "a failed revision"])
def test_the_job_deletes_old_revisions_that_would_keep_a_pod(site: Site, scaling: dict[str, Any]) -> None:
    api, changes = site.api, [{}, {"image": "registry.example/lamina:missing"}, {"log_level": "debug"}]
    gateway = Ref("serving.knative.dev/v1", "Service", "default", "chat")
    for index, change in enumerate(changes):
        rendered = objects(stage={"autoscaling": scaling}, **change)
        stage = stage_name(rendered, 1)
        if index == 1 and not scaling:
            api.behaviours[stage] = image_pull_fails
        for each in rendered:
            site.cluster.apply(each, force=True)
        wait_until(lambda: is_ready(site.cluster.get(gateway)))
        wait_until(lambda index=index, stage=stage: f"{stage}-{index + 1:05}-pod" in api.named("pods"))
        api.behaviours.clear()
    with start_job(api, DIGEST, stage={"autoscaling": scaling}, **changes[-1]) as job:
        assert job.wait(60) == 0
    kept = [f"{stage}-00003"] if scaling else [f"{stage}-00001", f"{stage}-00003"]
    assert [name for name in api.named("revisions") if name.startswith(stage)] == kept
    assert [name for name in api.named("pods") if name.startswith(stage)] == [f"{stage}-00003-pod"]


def test_each_change_of_the_spec_has_a_job_of_its_own() -> None:
    """A Job cannot be changed, and one that has ended does not run again."""
    pipelines = [resolved_pipeline(), resolved_pipeline(log_level="debug"), resolved_pipeline(OTHER_DIGEST)]
    assert len({for_gitops(each, render(each))["prune.yaml"][-1]["metadata"]["name"] for each in pipelines}) == 3


@pytest.mark.slow
def test_the_job_waits_for_answers_of_an_old_gateway(api: KubernetesApi) -> None:
    put_old_gateway(api, "Running")
    with start_job(api, OTHER_DIGEST) as job:
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(4)
        assert len(stages(api, DIGEST)) == 3
        put_old_gateway(api, "Succeeded")
        assert job.wait(60) == 0
    assert stages(api, DIGEST) == set()
    assert len(stages(api, OTHER_DIGEST)) == 3


@pytest.mark.slow
def test_the_job_fails_with_the_reason_at_its_timeout(api: KubernetesApi) -> None:
    put_old_gateway(api, "Running")
    with start_job(api, OTHER_DIGEST, seconds=1) as job:
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 1
    assert "still finish answers" in output
    assert len(stages(api, DIGEST)) == 3


def test_the_job_of_a_replaced_pipeline_deletes_nothing(api: KubernetesApi) -> None:
    with start_job(api, DIGEST) as job:
        assert job.wait(60) == 0
    assert len(stages(api, DIGEST)) == len(stages(api, OTHER_DIGEST)) == 3


def test_the_container_has_the_name_that_kn_gives_it() -> None:
    """With any other name, a second `make deploy-kn` made a new revision of every Service."""
    for each in filter(is_knative_service, objects()):
        assert [container["name"] for container in each["spec"]["template"]["spec"]["containers"]] == ["user-container"]


def test_a_fleet_keeps_its_members_stages_and_prunes_those_that_no_member_names(api: KubernetesApi, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    members = [member_document("code"), member_document("draw", cut="0:30")]
    file.write_text(yaml.safe_dump(fleet_document(members=members, eventing=EVENTING)))
    out = tmp_path / "manifests"
    result = CliRunner().invoke(main, ["render", str(file), "--gitops", "--output", str(out)])
    assert result.exit_code == 0, result.output
    found = written(out)
    services = [each for each in found if each["kind"] == "Service"]
    stages = [each for each in services if each["metadata"]["labels"]["app.kubernetes.io/component"] == "stage"]
    assert len(services) == len(stages) + 2, "a gateway, and one for events"
    assert len(stages) == 3 + 1
    assert [each for each in found if "Prune=false" in _option(each)] == stages
    waved = [each for each in found if each["kind"] in ("Service", "ConfigMap")]
    waves = {each["metadata"]["name"]: each["metadata"]["annotations"][ARGO + "sync-wave"] for each in waved}
    assert {waves[each["metadata"]["name"]] for each in stages} == {"1"}
    assert waves["code"] == waves["draw"] == waves["models"] == "2"
    (job,) = (each for each in found if each["kind"] == "Job")
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][3:6] == ["default", "models", "fleet"]

    before = set(api.named("services"))
    for each in [*stages, *(each for each in found if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "code")]:
        api.put(each)
    assert prune_fleet(NamespaceApi(api.url, "default", "models"), "models", 30.0) == ""
    assert set(api.named("services")) - before == {
        each["metadata"]["name"] for each in stages if each["metadata"]["name"].startswith("code-")
    }
