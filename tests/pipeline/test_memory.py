"""What serving holds: keys and values take the bytes that the planner says, and abandoned sequences leave none behind."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.functions.functions import ROOT, FunctionProcess, running_gateway, wait_until
from tests.support.functions.metrics import metric
from tests.support.storage.published import Published

AT_ONCE = 16
BUDGET_BYTES = 64 * 2**20
FILL = """
import json, os, sys
from functions.stage.models.native.group import NativeGroup
from knative.spec.model_shape import shape_from_config
from knative.spec.sizing import plan_stages
from tests.support.storage.published import CONFIG

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

dtype, budget, head_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = CONFIG | {"head_dim": head_dim}
plan = plan_stages(shape_from_config(config, "tiny", dtype), ((0, 2), (2, 6)))[1]
def filled(budget):
    pool = NativeGroup(config, 2, 6, dtype, budget).kv
    pool.arena[...] = 1
    return pool

filled(2**21)  # the code that it runs takes memory, too
before = resident()
pool = filled(budget)
print(json.dumps([resident() - before, plan.kv_bytes_per_token * pool.capacity_tokens]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
def test_keys_and_values_take_the_bytes_that_the_plan_says(dtype: str, head_dim: int) -> None:
    """Compares with the memory of the process that holds them, to within 5 %; heads are padded in memory."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", FILL, dtype, str(BUDGET_BYTES), str(head_dim)],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    grown, planned = json.loads(said.stdout)
    assert planned == pytest.approx(BUDGET_BYTES, rel=0.05)
    assert grown == pytest.approx(planned, rel=0.05)


def test_abandoned_sequences_leave_nothing_behind(published: Published, stages: list[FunctionProcess], wide: bool) -> None:
    """Clients that leave before anything came, at the first byte, and in the middle of the answer."""
    sequences = 1000 if wide else 200
    capacity = [metric(stage, "lamina_stage_free_tokens") for stage in stages]
    with (
        running_gateway(published, stages, LAMINA_QUEUE_LIMIT=str(sequences)) as gateway,
        ThreadPoolExecutor(AT_ONCE) as clients,
    ):
        list(clients.map(lambda number: abandon(gateway, number), range(sequences)))
        wait_until(lambda: metric(gateway, "lamina_gateway_sequences_total") >= sequences, 120)
        for name in ("running_sequences", "waiting_sequences", "events_in_flight"):
            wait_until(lambda name=name: metric(gateway, f"lamina_gateway_{name}") == 0, 60)
        wait_until(lambda: all(metric(stage, "lamina_stage_sequences") == 0 for stage in stages), 60)
        assert [metric(stage, "lamina_stage_free_tokens") for stage in stages] == capacity


def abandon(gateway: FunctionProcess, number: int) -> None:
    """Asks for an answer far longer than it is listened to."""
    body = json.dumps({"model": "tiny", "prompt": f"number {number}", "max_tokens": 200, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(head + body)
        for _ in range(number % 3):
            connection.recv(64)
