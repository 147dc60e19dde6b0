"""No process outlives the platform, whatever ends it; one run at a time holds the state folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from knative.local.errors import StateError
from knative.local.kubelet.processes import dying_with_parent, memory_bytes
from knative.local.platform import ROOT
from knative.local.state_folder import RunningPlatform, StateFolder, find_running


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_pod_outlives_the_platform(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.support.knative.platform_process", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as platform:
        assert platform.stdout is not None
        pids = [int(pid) for pid in platform.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        platform.send_signal(number)
    wait_until(lambda: not any(map(alive, pids)))


def test_the_launcher_keeps_command_arguments_and_environment() -> None:
    environ = {"PATH": os.environ["PATH"], "WORD": 'it\'s "quoted"'}
    program = "import os, sys; print(os.environ['WORD'], sys.argv[1:])"
    command = dying_with_parent([sys.executable, "-c", program, "a b", ""], environ)
    output = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert output == "it's \"quoted\" ['a b', '']\n"


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        dying_with_parent(["no-such-program"], {"PATH": os.environ["PATH"]})


def test_memory_is_that_of_the_process_alone() -> None:
    assert 2**20 < memory_bytes(os.getpid()) < 2**34
    assert memory_bytes(2**22 + 1) == 0


def test_a_second_run_is_told_where_the_first_is(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as state:
        state.publish(RunningPlatform(pid=os.getpid(), admin_url="http://a", gateway_url="http://127.0.0.1:8080"))
        with pytest.raises(StateError, match=rf"process {os.getpid()}, serving http://127\.0\.0\.1:8080.*--state"):
            StateFolder(tmp_path / "state").__enter__()
        assert find_running(tmp_path / "state") is not None
    assert find_running(tmp_path / "state") is None
    with StateFolder(tmp_path / "state") as again:
        assert not again.recovered


def test_what_a_killed_run_left_is_found_and_cleaned(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        state.publish(RunningPlatform(pid=1, admin_url="http://a", gateway_url="http://g"))
        (state.logs / "pod.log").write_text("last words")
        left = (tmp_path / "platform.json").read_bytes()
    (tmp_path / "platform.json").write_bytes(left)
    assert find_running(tmp_path) is None
    with StateFolder(tmp_path) as state:
        assert state.recovered
        assert list(state.logs.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/state: cannot be used: Not a directory; .*--state"):
        StateFolder(tmp_path / "file" / "state").__enter__()


def test_the_stores_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        state.publish(RunningPlatform(pid=1, admin_url="http://a", gateway_url="http://g"))
        assert (tmp_path / "platform.json").stat().st_mode & 0o077 == 0
