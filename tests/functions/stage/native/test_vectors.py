"""The vectors of each level, ARM's among them, against the portable ones; and whole passes on an emulated ARM CPU."""

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from functions.stage.native.compiler import SOURCE
from functions.stage.native.library import library

HERE: Final = Path(__file__).parent
ZIG: Final = (sys.executable, "-m", "ziglang", "cc", "-g0", "-fno-sanitize=undefined")
ARM: Final = ("-target", "aarch64-linux-musl")
AVX512: Final = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"
LEVELS: Final = {  # level → header, CPU features, further flags
    "avx2": ("vectors_avx2.h", "avx2,fma,f16c", ()),
    "avx512_vnni": ("vectors_avx512.h", AVX512, ()),
    "avx512_bf16": ("vectors_avx512.h", f"{AVX512},avx512bf16,avx512vbmi", ("-DWITH_BF16",)),
    "neon_dotprod": ("vectors_neon.h", "arch=armv8.2-a+dotprod", ARM),
    "neon_i8mm": ("vectors_neon.h", "arch=armv8.2-a+dotprod+i8mm", ("-DWITH_I8MM", *ARM)),
}


def lines_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def emulated(level: str) -> list[str]:
    """The command that runs a program for a level here; skips the test if none can."""
    if level in library().levels:
        return []
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not level.startswith("neon"):
        pytest.skip(f"this CPU has no {level}")
    if emulator is None and platform.machine() != "aarch64":
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user)")
    return [emulator] if emulator else []


@pytest.mark.parametrize("level", LEVELS)
def test_functions_of_vectors_make_what_the_portable_ones_make(
    level: str, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    def said(command: list[str], *options: str) -> list[str]:
        """What vectors.c prints. zig's compiler driver would build ARM's C library to link it, for half a minute."""
        made = compiled(ZIG, [HERE / "vectors.c"], ("-O1", "-c", *options))
        lines_of(sys.executable, "-m", "ziglang", "ld.lld", made, "-o", tmp_path / "vectors")
        return lines_of(*command, tmp_path / "vectors")

    header, features, flags = LEVELS[level]
    found = said(emulated(level), f'-DVECTORS="{header}"', f'-DTARGET="{features}"', *flags)
    wanted = said([], '-DVECTORS="vectors_portable.h"')
    assert len(found) == len(wanted) == 50 * 36
    for line, other in zip(found, wanted, strict=True):
        if line.startswith("~"):
            assert floats(line) == pytest.approx(floats(other), rel=1e-3, abs=1e-3), line.split()[0]
        else:
            assert line == other


def floats(line: str) -> list[float]:
    return list(struct.unpack(">16f", bytes.fromhex("".join(line.split()[1:]))))


@pytest.mark.skipif("LAMINA_FUZZ_ROUNDS" not in os.environ, reason="make sanitize runs it: compiling for ARM takes a minute")
@pytest.mark.timeout(600)
def test_passes_on_an_emulated_arm_cpu_make_what_portable_ones_make(compiled: Callable[..., Path]) -> None:
    """Random groups of layers of every kind, and products; see border_fuzz.c. The whole library runs, and chooses its level."""
    command = emulated("neon_dotprod")
    file = compiled(ZIG, [HERE / "border_fuzz.c", *sorted(SOURCE.glob("*.c"))], ("-O1", *ARM, "-static"))
    wanted = lines_of(*command, file, "1", "400", "0")
    assert wanted[-1].startswith("382 accepted"), wanted[-1]
    for level in ("1", "2"):
        for line, other in zip(lines_of(*command, file, "1", "400", level), wanted, strict=True):
            assert line.split()[0] == other.split()[0]
            if line != wanted[-1]:
                assert float(line.split()[1]) == pytest.approx(float(other.split()[1]), rel=1e-5, nan_ok=True), (level, line)
