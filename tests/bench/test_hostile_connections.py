"""The peak memory of one gateway under hostile connections."""

import asyncio

import pytest

from tests.support.functions.functions import FunctionProcess
from tests.support.functions.hostile_connections import peak_memory

# The budget of bodies is 64 MiB. Beside it are heads, buffers of the kernel's bytes, and the threads of running streams.
PEAK_BYTES = 200 * 2**20


@pytest.mark.slow
def test_two_hundred_hostile_connections_take_bounded_memory_and_leave_a_gateway_that_answers(gateway: FunctionProcess) -> None:
    before, peak, after = asyncio.run(peak_memory(gateway.url, gateway.process.pid, 6.0, "tiny"))
    print(f"before {before / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, after {after / 2**20:.0f} MiB")
    assert peak - before < PEAK_BYTES
    assert gateway.get("/v1/models")[0] == 200
