"""What `make` does on a cluster's behalf, with kn and kubectl that only write down what they were told."""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.functions.functions import gateway_environment, running, stage_environment
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.paths import ROOT
from tests.support.storage import tiny_models
from tests.support.storage.published import Published

# Tools of recipes, without kn, kubectl or a container engine of this machine.
TOOLS = ("awk", "bash", "cat", "env", "ln", "mkdir", "mktemp", "rm", "sh")
# Keeps make from installing anything.
STAMPS = ("-o", ".venv/run.stamp", "-o", ".venv/native.stamp", "-o", ".venv/dev.stamp")


def make(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    for name in TOOLS:
        if not (folder / name).exists():
            (folder / name).symlink_to(found(name))
    command = [found("make"), "--no-print-directory", *STAMPS, *arguments]
    environ = {"PATH": str(folder), "HOME": str(folder), **environ}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)


def found(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed"
    return path


def tool(folder: Path, name: str) -> None:
    script = folder / name
    script.write_text(f'#!/bin/sh\nfor each in "$@"; do [ ! -f "$each" ] || cat "$each"; done > {folder}/seen.yaml\n')
    with script.open("a") as file:
        file.write(f'echo "{name} $*" >> {folder}/calls\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def environ(published: Published) -> dict[str, str]:
    store = published.store
    return {
        "LAMINA_STORE_ENDPOINT": store.endpoint_url,
        "LAMINA_STORE_BUCKET": store.bucket,
        "AWS_ACCESS_KEY_ID": store.access_key_id,
        "AWS_SECRET_ACCESS_KEY": store.secret_access_key,
    }


@pytest.fixture
def spec(tmp_path: Path, published: Published) -> Path:
    document = {
        "name": "chat",
        "namespace": "models",
        "model": {"name": "tiny", "dtype": "float32"},
        "stages": 2,
        "image": "registry.example/lamina:1",
        "store": {"endpoint": published.store.endpoint_url},
        "gateway": {"max_unavailable": 1},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "pipeline.yaml"


@pytest.fixture
def api(tmp_path: Path, environ: dict[str, str]) -> Iterator[KubernetesApi]:
    """A cluster with the namespace `models`, and the store's keys in it. KUBECONFIG of `environ` names it."""
    api = KubernetesApi()
    api.add_namespace("models")
    keys = {"AWS_ACCESS_KEY_ID": "eA==", "AWS_SECRET_ACCESS_KEY": "eA=="}
    metadata = {"name": "lamina-store", "namespace": "models"}
    api.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": keys})
    (tmp_path / "kubeconfig").write_text(api.kubeconfig("there"))
    environ["KUBECONFIG"] = str(tmp_path / "kubeconfig")
    yield api
    api.close()


def test_kn_waits_for_nothing_that_is_missing(tmp_path: Path, spec: Path, environ: dict[str, str], api: KubernetesApi) -> None:
    """Without a Secret pods never start: kn waited for the first stage to its limit."""
    api.remove("v1", "secrets", "models", "lamina-store")
    tool(tmp_path, "kn")
    tool(tmp_path, "kubectl")
    done = make(tmp_path, "deploy-kn", f"SPEC={spec}", "CONTEXT=there", **environ)
    assert done.returncode == 2
    assert "Secret models/lamina-store is missing" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_kn_gets_a_file_for_each_service_and_kubectl_the_rest(
    tmp_path: Path, spec: Path, environ: dict[str, str], api: KubernetesApi
) -> None:
    tool(tmp_path, "kn")
    tool(tmp_path, "kubectl")
    arguments = (f"SPEC={spec}", "CONTEXT=there", "IMAGE=registry.example/other:2")
    done = make(tmp_path, "deploy-kn", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    assert api.named("secrets") == ["chat-pipeline", "lamina-store"], "the token is made before anything waits for it"
    calls = (tmp_path / "calls").read_text().splitlines()
    kubectl = [call for call in calls if call.startswith("kubectl")]
    assert [Path(call.split()[-1]).name for call in kubectl] == ["access.yaml", "disruption.yaml", "network.yaml"]
    assert all("--context there apply --filename" in call for call in kubectl)
    assert calls[: len(kubectl)] == kubectl
    applied = [call.split() for call in calls if call.startswith("kn ")]
    assert [Path(call[call.index("--filename") + 1]).name for call in applied] == [
        "stage-0.yaml",
        "stage-1.yaml",
        "gateway.yaml",
    ]
    assert all(call[:5] == ["kn", "--context", "there", "service", "apply"] for call in applied)
    assert all(call[call.index("--namespace") + 1] == "models" for call in applied)
    gateway = yaml.safe_load((tmp_path / "seen.yaml").read_text())
    assert gateway["metadata"]["name"] == applied[-1][5] == "chat"
    assert gateway["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/other:2"


@pytest.fixture(scope="module")
def ingress(published: Published) -> Iterator[str]:
    """URL of what stands for the ingress: a pipeline of real functions answers there."""
    cut = ((0, 6),)
    with (
        running([stage_environment(published, 0, cut)]) as (stage,),
        running([gateway_environment(published, [stage.url], cut, LAMINA_HOSTS="chat.models.example")]) as (gateway,),
    ):
        yield gateway.url


@pytest.mark.parametrize("kind", ["pipeline", "fleet"])
def test_deploy_all_pushes_applies_waits_and_asks(
    kind: str, tmp_path: Path, spec: Path, environ: dict[str, str], published: Published, api: KubernetesApi, ingress: str
) -> None:
    """The cluster is a stand-in."""
    if kind == "fleet":
        pipeline = yaml.safe_load(spec.read_text())
        member = {"name": "tiny", **{key: pipeline.pop(key) for key in ("model", "stages")}}
        spec.write_text(yaml.safe_dump({"kind": "Fleet", **pipeline, "members": [member]}))
    arguments = (f"SPEC={spec}", f"INGRESS={ingress}", "PROMPT=the weather", "MAX_TOKENS=4")
    done = make(tmp_path, "deploy-all", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    assert "digest: " + published.manifest.digest in done.stdout
    assert "http://chat.models.example\n" in done.stdout
    assert "tokens, first after" in done.stdout
    services = api.named("services")
    assert len(services) == 3
    undone = make(tmp_path, "undeploy-all", f"SPEC={spec}", **environ)
    assert "objects deleted" in undone.stdout, undone.stderr
    assert api.named("services") == []


@pytest.mark.parametrize("variables", [(), ("INGRESS=http://127.0.0.1:9",)], ids=["", "with INGRESS"])
def test_without_a_domain_the_pipeline_is_deployed_and_how_to_reach_it_is_told(
    tmp_path: Path, spec: Path, environ: dict[str, str], api: KubernetesApi, variables: tuple[str, ...]
) -> None:
    """No ingress serves `*.svc.cluster.local`."""
    api.domain = "svc.cluster.local"
    done = make(tmp_path, "deploy-all", f"SPEC={spec}", *variables, **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("http://chat.models.svc.cluster.local\n")
    assert "port-forward" in done.stderr
    assert ".venv/bin/python -m knative ask http://127.0.0.1:8080 'What is the capital of France?'" in done.stderr


def test_what_is_missing_is_named_before_anything_is_done(tmp_path: Path, spec: Path, environ: dict[str, str]) -> None:
    bare = make(tmp_path, "deploy-all")
    assert "SPEC= names the pipeline" in bare.stderr
    nowhere = make(tmp_path, "deploy-all", f"SPEC={spec}")
    assert "LAMINA_STORE_ENDPOINT is not set" in nowhere.stderr
    without_kn = make(tmp_path, "deploy-kn", f"SPEC={spec}", **environ)
    assert "kn not found" in without_kn.stderr
    assert {bare.returncode, nowhere.returncode, without_kn.returncode} == {2}


def test_an_unpublished_model_needs_a_source(tmp_path: Path, spec: Path, environ: dict[str, str]) -> None:
    spec.write_text(spec.read_text().replace("name: tiny", "name: huge"))
    done = make(tmp_path, "deploy-all", f"SPEC={spec}", **environ)
    assert done.returncode == 2
    assert "huge is not published as float32; name its SOURCE" in done.stderr


def test_the_image_is_built_by_the_engine_that_is_there(tmp_path: Path) -> None:
    missing = make(tmp_path, "image")
    assert "no podman, buildah or docker here" in missing.stderr
    tool(tmp_path, "buildah")
    done = make(tmp_path, "image", "IMAGE=registry.example/lamina:7", "ACCELERATOR=cuda")
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "calls").read_text()
    assert "--tag registry.example/lamina:7" in call
    assert "ACCELERATOR=cuda" in call
    assert "--target full" in call
    make(tmp_path, "image", "IMAGE=registry.example/lamina:7")
    assert "--target lean" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_model_that_takes_torch_gets_it_and_the_default_one_does_not(tmp_path: Path) -> None:
    """Nothing is installed: make says what it would do. The virtual environment is this one, without its stamps."""
    tiny_models.whole_model("bloom").save_pretrained(tmp_path / "bloom")
    (tmp_path / "venv").mkdir()
    for part in (ROOT / ".venv").iterdir():
        if not part.name.endswith(".stamp"):
            (tmp_path / "venv" / part.name).symlink_to(part)
    lean = make(tmp_path, "-n", "run", f"VENV={tmp_path / 'venv'}")
    assert "--no-compile -r requirements-lean.lock.txt" in lean.stdout
    assert "requirements-torch.lock.txt" not in lean.stdout
    wanted = make(tmp_path, "-n", "run", f"VENV={tmp_path / 'venv'}", f"MODEL={tmp_path / 'bloom'}")
    assert "needs torch: Lamina's own layers do not run a 'bloom'" in wanted.stderr
    assert "pip install --disable-pip-version-check -r requirements-torch.lock.txt" in wanted.stdout


def test_help_lists_every_target(tmp_path: Path) -> None:
    shown = make(tmp_path, "help").stdout
    targets = {line.split(":")[1].strip() for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY")}
    assert {target for target in targets if f"\n  {target} " not in shown} == {"needs-spec", "needs-store", "needs-libraries"}
