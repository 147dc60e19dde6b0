"""Random calls of the library under the sanitizers of installed compilers: no foreign memory, no race of its threads.

`make test` builds once and without optimization. `make sanitize` runs everything.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from functions.stage.native.compiler import SOURCE, CompilationFailed

DRIVER: Final = Path(__file__).with_name("border_fuzz.c")
EVERYTHING: Final = "LAMINA_FUZZ_ROUNDS" in os.environ
ROUNDS: Final = int(os.environ.get("LAMINA_FUZZ_ROUNDS") or 600)
ENVIRONMENT: Final = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
"""gcc 12 puts vectors of 64 bytes at addresses of 32 otherwise, and crashes."""
CALLS: Final = ("--param", "asan-instrumentation-with-call-threshold=0")  # gcc compiles checks in line for twice as long
ZIG: Final = (sys.executable, "-m", "ziglang", "cc")
SANITIZERS: Final[dict[str, tuple[Sequence[str], str]]] = {
    "gcc": (("gcc", "-Wno-psabi"), "address,undefined"),
    "clang": (("clang",), "address,undefined"),
    "zig": (ZIG, "undefined"),
    "zig, threads": (ZIG, "thread"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiler", SANITIZERS)
def test_random_calls_are_sound(compiler: str, compiled: Callable[..., Path], own_sources: Sequence[str | Path]) -> None:
    command, sanitizers = SANITIZERS[compiler]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {compiler} here")
    if not EVERYTHING and compiler != "gcc" and shutil.which("gcc"):
        pytest.skip(f"make sanitize runs {compiler}, too")
    optimized = ("-O1", "-g") if EVERYTHING else ("-O0", "-g1", *CALLS)
    files = [DRIVER, *(sorted(SOURCE.glob("*.c")) if EVERYTHING else own_sources)]
    try:
        fuzz = compiled(command, files, (*optimized, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-lm"))
    except CompilationFailed as failed:
        if "sanitize" not in str(failed):
            raise
        pytest.skip(f"{compiler} brings no {sanitizers} here: {str(failed)[-200:]}")
    for seed in range(3):
        done = subprocess.run([fuzz, str(seed), str(ROUNDS)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        accepted, refused = map(int, re.findall(r"\d+", done.stdout))
        assert accepted > ROUNDS / 4
        assert refused > ROUNDS / 10
