"""Structs that many threads decode for the first time at the same moment."""

import subprocess
import sys
from typing import Final

import pytest

from tests.support.paths import ROOT

RACE: Final = """
import sys, threading
import msgspec
from eventing.wire.framing import decode_json

def struct(**fields):
    return type(msgspec.Struct)("S", (msgspec.Struct,), {"__annotations__": fields, **dict.fromkeys(fields)})

def decode(type_, barrier, seen):
    barrier.wait()
    seen.append(decode_json(b'{"first": 1, "last": 2}', type_).last)

sys.setswitchinterval(1e-6)
for _ in range(200):
    inner = [struct(**{f"f{number}": list[dict[str, int]] | None for number in range(20)}) for _ in range(2)]
    outer = struct(first=int, one=inner[0], other=inner[1], last=int)
    barrier, seen = threading.Barrier(8), []
    threads = [threading.Thread(target=decode, args=(outer, barrier, seen)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2] * 8
"""


@pytest.mark.slow
def test_the_first_to_decode_a_struct_may_be_many() -> None:
    """By `msgspec.json.decode`, the same ends by SIGSEGV within a few rounds."""
    ended = subprocess.run([sys.executable, "-c", RACE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
