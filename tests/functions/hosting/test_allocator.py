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


_FREES = """
import ctypes, os, sys, time
from functions.hosting.startup import return_free_memory
from knative.local.kubelet.processes import memory_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
blocks = [libc.malloc(64_000) for _ in range(1_000)]
for block in blocks:
    ctypes.memset(block, 1, 64_000)
for block in blocks[:-1]:  # the last one keeps the arena's end in use
    libc.free(block)
kept = memory_bytes(os.getpid())
if sys.argv[1] == "returned":
    return_free_memory(every_seconds=0.05)
    deadline = time.monotonic() + 30
    while memory_bytes(os.getpid()) > kept - 50_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
print(kept - memory_bytes(os.getpid()))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_memory_is_returned() -> None:
    def returned(how: str) -> int:
        command = [sys.executable, "-c", _FREES, how]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert returned("as it is") < 1_000_000
    assert returned("returned") > 50_000_000
