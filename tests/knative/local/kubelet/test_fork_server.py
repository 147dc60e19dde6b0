"""Pods that are forked: each as if it had been started afresh, watched to its end, and none outliving its server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from knative.local.kubelet.containers import FUNCTION
from knative.local.kubelet.fork_server import MODULES
from knative.local.kubelet.fork_starter import ForkStarter
from knative.local.kubelet.processes import PlainStarter, Process, kill_group
from tests.support.paths import ROOT

PROBE = "tests.support.knative.fork_probe"
ENVIRON = {"PATH": os.environ["PATH"], "ONLY": "this", "LC_ALL": "C.UTF-8"}  # in the C locale Python adds LC_CTYPE
DEADLINE_SECONDS = 60.0
NEVER = {"torch", "transformers", "boto3", "kubernetes", "aiohttp", "rich"}


@asynccontextmanager
async def forking(folder: Path, module: str = PROBE) -> AsyncIterator[ForkStarter]:
    async with asyncio.timeout(DEADLINE_SECONDS), ForkStarter(ROOT, folder / "server.log", module=module) as starter:
        yield starter


async def said(starter: ForkStarter, log: Path, **environ: str) -> dict[str, Any]:
    """What a pod that ended at once says of itself."""
    process = await starter.start(FUNCTION, ENVIRON | environ, ROOT, log)
    assert await process.wait() == 0, log.read_text()
    description: dict[str, Any] = json.loads(log.read_text().splitlines()[0])
    assert description["pid"] == process.pid
    return description


def server_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def gone(pid: int) -> None:
    """Returns once there is no such process, or only its zombie in a place that reaps none."""
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        await asyncio.sleep(0.01)


def test_a_forked_pod_is_as_one_started_afresh(tmp_path: Path) -> None:
    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        async with forking(tmp_path) as starter:
            forked = await said(starter, tmp_path / "forked.log")
        code = f"from {PROBE} import *; sys.exit(main([], os.environ))"
        plain = await PlainStarter().start((sys.executable, "-c", code), ENVIRON, ROOT, tmp_path / "plain.log")
        assert await plain.wait() == 0
        return forked, json.loads((tmp_path / "plain.log").read_text().splitlines()[0])

    forked, plain = asyncio.run(run())
    for description in (forked, plain):
        assert description["session"] == description["group"] == description["pid"]
    same = ("folder", "environ", "descriptors", "stdin", "signals", "interrupt", "threads", "files", "arguments")
    assert {key: forked[key] for key in same} == {key: plain[key] for key in same}
    assert forked["environ"] == ENVIRON
    assert forked["descriptors"] == [0, 1, 2]
    assert forked["threads"] == [1, 1]
    assert (tmp_path / "forked.log").read_text().endswith("to stderr\n")


def test_what_a_pod_has_used_begins_with_its_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_MODULES", "torch")

    async def run() -> dict[str, Any]:
        async with forking(tmp_path) as starter:
            return await said(starter, tmp_path / "pod.log")

    description = asyncio.run(run())
    assert description["cpu_seconds"] < 0.5
    assert description["age_seconds"] < 0.5


def test_no_two_pods_draw_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_MODULES", "torch,numpy.random")

    async def run() -> list[list[float]]:
        async with forking(tmp_path) as starter:
            return [(await said(starter, tmp_path / f"{number}.log"))["random"] for number in range(3)]

    for drawn in zip(*asyncio.run(run()), strict=True):
        assert len(set(drawn)) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pod_computes_with_its_own_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """OpenMP has read the server's environment; torch.set_num_threads, which a stage calls, is what counts in a fork."""
    monkeypatch.setenv("PROBE_MODULES", "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    async def run() -> dict[str, Any]:
        async with forking(tmp_path) as starter:
            return await said(starter, tmp_path / "pod.log", THREADS=str(threads))

    computed = asyncio.run(run())["computed"]
    assert computed == {"torch": threads, "started": threads - 1}


@pytest.mark.parametrize(
    ("environ", "number", "status"),
    [
        ({"STATUS": "3"}, None, 3),
        ({"RAISE": "1"}, None, 1),
        ({"EXIT": "4"}, None, 4),
        ({"WAIT": "1"}, signal.SIGTERM, -signal.SIGTERM),
        ({"WAIT": "1"}, signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["status", "raised", "exited", "terminated", "killed"],
)
def test_the_end_of_a_pod_is_told(tmp_path: Path, environ: dict[str, str], number: int | None, status: int) -> None:
    async def run() -> int:
        async with forking(tmp_path) as starter:
            process = await starter.start(FUNCTION, ENVIRON | environ, ROOT, tmp_path / "pod.log")
            if number is not None:
                os.killpg(process.pid, number)
            return await process.wait()

    assert asyncio.run(run()) == status
    if "RAISE" in environ:
        assert "RuntimeError: as it was told" in (tmp_path / "pod.log").read_text()


def test_many_pods_at_once(tmp_path: Path) -> None:
    async def run() -> list[int]:
        async with forking(tmp_path) as starter:
            starts = (
                starter.start(FUNCTION, ENVIRON | {"STATUS": str(number)}, ROOT, tmp_path / f"{number}.log")
                for number in range(20)
            )
            return [await process.wait() for process in await asyncio.gather(*starts)]

    assert asyncio.run(run()) == list(range(20))


def test_a_log_that_cannot_be_written_is_an_error_of_the_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with forking(tmp_path) as starter:
            with pytest.raises(OSError, match="No such file"):
                await starter.start(FUNCTION, ENVIRON, ROOT, tmp_path / "nowhere" / "pod.log")
            await said(starter, tmp_path / "pod.log")  # and the server goes on

    asyncio.run(run())


def test_other_commands_and_folders_are_started_plainly(tmp_path: Path) -> None:
    async def run() -> None:
        async with forking(tmp_path) as starter:
            for command, folder in ((("sh", "-c", "echo $ONLY from $PWD"), ROOT), (FUNCTION, tmp_path)):
                process = await starter.start(command, ENVIRON, folder, tmp_path / "pod.log")
                await process.wait()

    asyncio.run(run())
    first, *second = (tmp_path / "pod.log").read_text().splitlines()
    assert first == f"this from {ROOT}"
    assert "No module named functions" in second[-1]


def test_pods_end_with_their_server_and_the_next_start_launches_another(tmp_path: Path) -> None:
    async def run() -> None:
        async with forking(tmp_path) as starter:
            pods = [
                await starter.start(FUNCTION, ENVIRON | {"WAIT": "1"}, ROOT, tmp_path / f"{number}.log") for number in range(2)
            ]
            server = server_of(pods[0].pid)
            os.kill(server, signal.SIGKILL)
            assert [await pod.wait() for pod in pods] == [-signal.SIGKILL] * 2
            for pod in pods:
                await gone(pod.pid)
            again = await starter.start(FUNCTION, ENVIRON | {"WAIT": "1"}, ROOT, tmp_path / "again.log")
            assert server_of(again.pid) not in (server, os.getpid())

    asyncio.run(run())


def test_nothing_is_left_when_the_starter_is_closed(tmp_path: Path) -> None:
    async def run() -> Process:
        async with forking(tmp_path) as starter:
            return await starter.start(FUNCTION, ENVIRON | {"WAIT": "1"}, ROOT, tmp_path / "pod.log")

    process = asyncio.run(run())
    asyncio.run(asyncio.wait_for(gone(process.pid), DEADLINE_SECONDS))


def test_a_start_that_nobody_awaits_any_more_leaves_no_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with forking(tmp_path) as starter:
            await said(starter, tmp_path / "first.log")
            start = asyncio.create_task(starter.start(FUNCTION, ENVIRON | {"WAIT": "1"}, ROOT, tmp_path / "pod.log"))
            await asyncio.sleep(0)  # it has asked
            start.cancel()
            await said(starter, tmp_path / "second.log")  # answered behind it
            while not (tmp_path / "pod.log").exists():
                await asyncio.sleep(0.01)
            connection = await starter._connection()
            while connection._ends:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_server_that_cannot_be_launched_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[int]:
        async with forking(tmp_path, module="tests.no_such_module") as starter:
            pods = [await starter.start(FUNCTION, ENVIRON, ROOT, tmp_path / "pod.log") for _ in range(2)]
            return [await pod.wait() for pod in pods]

    assert asyncio.run(run()) == [2, 2]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "started plainly" in warning
    assert "no_such_module" in warning
    assert str(tmp_path / "server.log") in warning
    assert "LAMINA_ROLE" in (tmp_path / "pod.log").read_text()


def test_closing_while_the_server_imports_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_MODULES", "tests.support.knative.slow_import")

    async def run() -> int:
        async with forking(tmp_path):
            while not (tmp_path / "server.log").exists() or not (text := (tmp_path / "server.log").read_text()):
                await asyncio.sleep(0.01)
            return int(text.split()[0])

    pid = asyncio.run(run())
    asyncio.run(asyncio.wait_for(gone(pid), DEADLINE_SECONDS))


def test_a_module_that_starts_threads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROBE_MODULES", "tests.support.knative.thread_import")

    async def run() -> None:
        async with forking(tmp_path) as starter:
            process = await starter.start(FUNCTION, ENVIRON, ROOT, tmp_path / "pod.log")
            await process.wait()

    asyncio.run(run())
    assert "ThreadsRunning: 2 threads run after importing tests.support.knative.thread_import" in caplog.text


def test_what_the_real_server_imports() -> None:
    """Native stages and the web server, no torch, and not one thread: `import_all` checks that by itself."""
    code = f"from knative.local.kubelet.fork_server import *; import_all({MODULES!r}); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    modules = set(ended.stdout.split())
    assert modules >= {"numpy", "flask", "httptools", "cloudevents", "tokenizers"}
    assert not NEVER & modules


def test_pods_die_when_the_platform_is_killed(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from tests.knative.local.kubelet.test_fork_server import *
async def run():
    folder = Path(sys.argv[1])
    async with ForkStarter(ROOT, folder / "server.log", module=PROBE) as starter:
        pod = await starter.start(FUNCTION, ENVIRON | {"WAIT": "1"}, ROOT, folder / "pod.log")
        print(pod.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as platform:
        assert platform.stdout is not None
        pid = int(platform.stdout.readline())
        server = server_of(pid)
        platform.kill()
        for left in (pid, server):
            asyncio.run(asyncio.wait_for(gone(left), DEADLINE_SECONDS))
    kill_group(pid)
