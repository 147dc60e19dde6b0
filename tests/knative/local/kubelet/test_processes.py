"""No process outlives the platform, whatever ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from knative.local.kubelet.processes import dying_with_parent, memory_bytes
from knative.local.platform import ROOT
from tests.support.functions.functions import alive, wait_until


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


def test_memory_is_of_one_process() -> None:
    assert 2**20 < memory_bytes(os.getpid()) < 2**34
    assert memory_bytes(2**22 + 1) == 0
