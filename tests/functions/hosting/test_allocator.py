"""The C library's arenas, in a process of its own: they are counted by glibc itself (malloc_info(3))."""

import ctypes
import subprocess
import sys

import pytest

from knative.local.platform import ROOT

_ALLOCATES = """
import ctypes, os, sys, threading
from functions.hosting.startup import use_few_arenas
if sys.argv[1] == "few":
    use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
everyone = threading.Barrier(16)
def allocate():
    everyone.wait()
    assert libc.malloc(100_000)
    everyone.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_char_p)
libc.malloc_info.argtypes, libc.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
out = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, out)
libc.fclose(out)
"""


def arenas(how: str) -> int:
    command = [sys.executable, "-c", _ALLOCATES, how]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.count("<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_many_threads_share_two_arenas() -> None:
    assert arenas("as it is") > 2
    assert arenas("few") == 2
