"""Random calls of the library under the sanitizers of installed compilers: no foreign memory, no race of its threads.

Compiling takes nearly all of the time, so `make test` builds once and without optimization. `make sanitize` runs everything.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from functions.stage.native.compiler import FLAGS, SOURCE

DRIVER: Final = Path(__file__).with_name("border_fuzz.c")
EVERYTHING: Final = "LAMINA_FUZZ_ROUNDS" in os.environ
ROUNDS: Final = int(os.environ.get("LAMINA_FUZZ_ROUNDS") or 600)
ENVIRONMENT: Final = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
"""gcc 12 puts vectors of 64 bytes at addresses of 32 otherwise, and crashes."""
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
def test_random_calls_are_sound(compiler: str, tmp_path: Path) -> None:
    command, sanitizers = SANITIZERS[compiler]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {compiler} here")
    if not EVERYTHING and compiler != "gcc" and shutil.which("gcc"):
        pytest.skip(f"make sanitize runs {compiler}, too")
    optimized = ("-O1", "-g") if EVERYTHING else ("-O0", "-g1")
    build = [*command, *FLAGS, *optimized, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-I", str(SOURCE)]
    files = [str(DRIVER), *map(str, sorted(SOURCE.glob("*.c")))]
    made = subprocess.run([*build, *files, "-lm", "-o", tmp_path / "fuzz"], capture_output=True, text=True, check=False)
    if made.returncode and "sanitize" in made.stderr + made.stdout:
        pytest.skip(f"{compiler} brings no {sanitizers} here: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    for seed in range(3):
        fuzz = [tmp_path / "fuzz", str(seed), str(ROUNDS)]
        done = subprocess.run(fuzz, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        accepted, refused = map(int, re.findall(r"\d+", done.stdout))
        assert accepted > ROUNDS / 4
        assert refused > ROUNDS / 10
