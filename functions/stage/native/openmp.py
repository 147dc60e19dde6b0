"""Threads of the OpenMP that torch has loaded: one pool for torch's operators and the native layers."""

import ctypes
import os
from dataclasses import dataclass
from typing import Any


class NoOpenMP(Exception):
    """Torch runs without GNU's OpenMP here."""


@dataclass(frozen=True, slots=True)
class OpenMP:
    """Addresses of `omp_get_thread_num`, `omp_get_num_threads` and `GOMP_barrier`, for a function that threads run together."""

    thread_number: int
    threads: int
    barrier: int
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
        names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
        thread_number, threads, barrier = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
        return cls(thread_number, threads, barrier, parallel)

    def run(self, function: int, data: int, threads: int) -> None:
        """Calls the C function `void (void *)` with `data` on so many threads, this one among them; without the GIL."""
        self.parallel(function, data, threads, 0)
