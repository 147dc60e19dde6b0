"""Which CPU the machine code is for: a level that many CPUs share, so that an image can carry the code for all of them."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import llvmlite.binding as llvm
from numba.core import config


@dataclass(frozen=True, slots=True)
class Target:
    """In LLVM's words."""

    cpu: str | None
    """None: this CPU, with all that it has."""
    features: str | None


_AVX512: Final = "x86-64-v4"
_AVX2: Final = "x86-64-v3"
LEVELS: Final = (
    Target(_AVX512, "+avx512vnni,+avx512bf16"),
    Target(_AVX512, "+avx512vnni"),
    Target(_AVX512, ""),
    Target(_AVX2, ""),
)
"""Of x86-64, the best first."""
_NEEDED: Final[Mapping[str | None, tuple[str, ...]]] = {
    _AVX512: ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    _AVX2: ("avx2", "bmi2", "f16c", "fma"),
}


def of_this_machine() -> Target:
    """The best level that this CPU has all of; any other kind of CPU is taken as it is."""
    if not is_x86():
        return Target(None, None)
    has = llvm.get_host_cpu_features()
    for level in LEVELS:
        added = [feature.removeprefix("+") for feature in (level.features or "").split(",") if feature]
        if all(has.get(feature) for feature in (*_NEEDED[level.cpu], *added)):
            return level
    return Target(None, None)


def select(target: Target) -> None:
    """For everything that numba compiles from here on in this process."""
    config.CPU_NAME = target.cpu
    config.CPU_FEATURES = target.features


def is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def has_avx512() -> bool:
    """Of the selected target, like the others here."""
    return bool(config.CPU_NAME == _AVX512)


def has_avx512_bf16() -> bool:
    return has_avx512() and "+avx512bf16" in (config.CPU_FEATURES or "")


def has_avx2() -> bool:
    return bool(config.CPU_NAME == _AVX2)
