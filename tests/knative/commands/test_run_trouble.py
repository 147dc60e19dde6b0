"""Failures of `run` are one line, and leave no process. test_command_line.py has more."""

import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from functions.configuration.api_keys import sha256_of
from tests.support.knative.run_command import Run

SMALL = """
name: small
model: {name: tiny-model, dtype: float32}
stages: 2
image: "lamina:local"
store: {endpoint: "http://127.0.0.1:1"}
"""


def error_of(run: Run) -> str:
    """Its one line of error."""
    assert run.finish() == 1, run.seen
    assert "Traceback" not in run.seen
    assert run.processes() == []
    (line,) = re.findall(r"^Error: (.*)", run.seen, re.MULTILINE)
    return str(line)


@pytest.mark.slow
def test_a_port_in_use(running: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running.start("--port", str(port))
        assert error_of(running) == f"port {port} of 127.0.0.1 is in use by another process; choose another with --port"


@pytest.mark.slow
def test_functions_that_exit_at_once(running: Run, tmp_path: Path) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text(SMALL + "stage: {pod: {env: {PYTHONHOME: /nowhere}}}")
    running.start("--spec", str(spec))
    error = error_of(running)
    assert re.search(r"small-\w+-s\d cannot start: exit status 1: .*; log: .*\.log$", error)


@pytest.mark.slow
def test_a_spec_that_knative_would_reject(running: Run, tmp_path: Path) -> None:
    spec = tmp_path / "refused.yaml"
    spec.write_text(SMALL + "gateway: {autoscaling: {target_burst_capacity: -1}}")
    running.start("--spec", str(spec))
    assert "target_burst_capacity" in error_of(running)


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
def test_keys_of_which_only_hashes_are_known(running: Run, tmp_path: Path, once: bool) -> None:
    """As on a cluster. The first question would get 401."""
    spec, keys = tmp_path / "keyed.yaml", tmp_path / "secrets" / "chat-keys" / "api-keys"
    spec.write_text(SMALL + "gateway: {api_keys_secret: chat-keys}")
    keys.parent.mkdir(parents=True)
    keys.write_text(f"# of people\nsha256:{sha256_of('their key')} name=alice\n")
    running.start("--spec", str(spec), "--secrets", str(tmp_path / "secrets"), *(["--once"] if once else []))
    if once:
        assert error_of(running).startswith("cannot ask the first question: the gateway wants an API key")
        return
    running.read_until("serving on")
    assert "cannot ask the first question: the gateway wants an API key, and its Secret has none but hashes" in running.seen
    (url,) = re.findall(r"serving on (\S+) until", running.seen)
    asked = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer their key"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        assert b"tiny-model" in reply.read()
    running.send(signal.SIGINT)
    assert running.finish() == 0
    assert running.processes() == []


@pytest.mark.slow
def test_a_full_disk(running: Run) -> None:
    running.state.mkdir()
    script = f'mount -t tmpfs -o size=100k tmpfs "{running.state}" && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    running.start(inside=inside)
    assert re.match(rf"the disk of {running.state} is full \(\d+ KiB left\): free some, or choose --state", error_of(running))


@pytest.mark.slow
@pytest.mark.parametrize("after", ["publishing", "s0: starting", "serving on"])
def test_a_second_ctrl_c_leaves_no_process(running: Run, after: str) -> None:
    running.start()
    running.read_until(after)
    running.note_store()
    running.send(signal.SIGINT)
    running.send(signal.SIGINT)
    running.finish()
    assert running.processes() == []
