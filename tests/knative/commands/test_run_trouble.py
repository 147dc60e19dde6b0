"""Failures of `run` are one line, and leave no process. test_command_line.py has more."""

import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

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
