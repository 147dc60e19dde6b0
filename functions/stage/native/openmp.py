"""Threads of the OpenMP that torch has loaded: one pool for torch's operators and the native layers."""

import ctypes
import os
from dataclasses import dataclass
from typing import Any


class NoOpenMP(Exception):
    """Torch runs without GNU's OpenMP here."""


@dataclass(frozen=True, slots=True)
class OpenMP:
    """Addresses of C functions, for a function that threads run together."""

    thread_number: int
    """`omp_get_thread_num`"""
    threads: int
    """`omp_get_num_threads`"""
    give_way: int
    """`sched_yield`"""
    parallel: Any
    """`GOMP_parallel`"""

    @classmethod
    def of_torch(cls) -> "OpenMP":
        """Raises NoOpenMP. Torch must have been imported."""
        try:
            library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except (OSError, AttributeError) as error:
            raise NoOpenMP(f"torch runs without GNU's OpenMP here: {error}") from error
        parallel = library.GOMP_parallel
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        thread_number, threads = _address(library.omp_get_thread_num), _address(library.omp_get_num_threads)
        return cls(thread_number, threads, _address(ctypes.CDLL(None).sched_yield), parallel)

    def run(self, function: int, data: int, threads: int) -> None:
        """Calls the C function `void (void *)` with `data` on so many threads, this one among them; without the GIL."""
        self.parallel(function, data, threads, 0)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
