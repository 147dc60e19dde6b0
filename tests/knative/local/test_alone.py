"""knative/local without the rest of Lamina: a plain Knative Service under it, by its command and from Python."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from knative.local.autoscaler.scaler import Activity
from tests.support.knative.platform import client, fetch, revision, running_platform, until
from tests.support.paths import ROOT

README = (ROOT / "knative" / "local" / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The server and the manifest of the README, beside a copy of the packages that knative/local needs."""
    for package in ("eventing", "knative/local", "knative/webhook"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "knative" / "__init__.py", tmp_path / "knative")
    (tmp_path / "server.py").write_text(block("python"))
    (tmp_path / "hello.yaml").write_text(block("yaml"))
    return tmp_path


@pytest.mark.slow
def test_the_command_serves_from_zero_and_ends_its_processes(folder: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "knative.local", "hello.yaml", "--port", "hello=0"]
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True) as local:
        assert local.stdout is not None
        try:
            url = local.stdout.readline().split()[1]
            status_url = local.stdout.readline().split()[1].rstrip(",")

            async def ask() -> tuple[list[object], tuple[int, str], int]:
                async with client() as session:
                    (before,) = json.loads((await fetch(session, status_url))[1])["services"]
                    answer = await fetch(session, url)
                    (after,) = json.loads((await fetch(session, status_url))[1])["services"]
                    return before["revisions"][0]["pods"], answer, after["revisions"][0]["pods"][0]["pid"]

            pods_before, answer, pid = asyncio.run(ask())
            assert (pods_before, answer) == ([], (200, "Hello from hello-00001!\n"))
        finally:
            local.send_signal(signal.SIGINT)
    assert local.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (block("yaml").replace("command: [python3, server.py]", "args: [x]"), "containers[0].command: images are not run"),
        (block("yaml").replace("containers:", "container:"), 'unknown field "spec.template.spec.container"'),
        ("kind: ConfigMap", "hello.yaml: no Knative Service"),
        ("a: [1", "while parsing"),
    ],
)
def test_a_manifest_that_cannot_run_ends_the_command_with_one_error(folder: Path, manifest: str, message: str) -> None:
    (folder / "hello.yaml").write_text(manifest)
    command = [sys.executable, "-m", "knative.local", "hello.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_a_plain_service_scales_from_zero_and_to_zero(folder: Path) -> None:
    manifest = yaml.safe_load((folder / "hello.yaml").read_text())
    manifest["spec"]["template"]["metadata"] = {"annotations": {"autoscaling.knative.dev/window": "6s"}}
    async with running_platform(folder, manifest, folder=folder, entrypoint=()) as platform, client() as session:
        assert revision(platform, "hello").pods == []
        assert await fetch(session, platform.url("hello")) == (200, "Hello from hello-00001!\n")
        assert len(revision(platform, "hello").ready_pods) == 1
        await until(lambda: not revision(platform, "hello").pods)
        assert revision(platform, "hello").autoscaler.status.activity is Activity.INACTIVE
        assert await fetch(session, platform.url("hello")) == (200, "Hello from hello-00001!\n")
