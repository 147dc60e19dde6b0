"""llama.cpp and vLLM as peers: how vLLM is started, and what a report says of a peer that is missing."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import llama_cpp
from bench.peers import vllm
from bench.pipeline import DidNotStart
from bench.serving.client import Measurement
from bench.serving.contenders import LLAMA_CPP, PREFILL, SINGLE, Contender, ContenderEnded, measure_all
from bench.serving.report import BF16, Findings, markdown, verdicts
from bench.serving.requests import Request
from tests.support.functions.functions import alive, wait_until
from tests.support.paths import ROOT

# Answers each prompt with as many tokens as were asked for, and has a process of its own that does not end by itself.
STAND_IN_VLLM = """
import subprocess
from types import SimpleNamespace

SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model, **options):
        assert model == "model"
        with open("engine", "w") as file:
            file.write(str(subprocess.Popen(["sleep", "600"]).pid))

    def generate(self, prompts, params, use_tqdm):
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * each.max_tokens)]) for each in params]
"""
# Take half a second to listen, and end at once if a server does not listen yet, as llama.cpp's programs do.
STAND_IN_RPC_SERVER = """
import socket, sys, time

time.sleep(0.5)
listening = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
while True:
    listening.accept()[0].close()
"""
STAND_IN_LLAMA_SERVER = """
import http.server, socket, sys

for address in sys.argv[sys.argv.index("--rpc") + 1].split(","):
    host, port = address.split(":")
    socket.create_connection((host, int(port))).close()


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
WHY = "llama.cpp is not built: make llama-cpp"


def test_without_a_build_the_peer_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "SOURCES", tmp_path)
    with pytest.raises(DidNotStart) as raised, llama_cpp.llama_server(tmp_path / "model.gguf", tmp_path / "log", 1):
        pass
    assert raised.value.why == WHY


def test_rpc_servers_listen_before_llama_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs := tmp_path / "build" / "bin").mkdir(parents=True)
    for name, text in (("ggml-rpc-server", STAND_IN_RPC_SERVER), ("llama-server", STAND_IN_LLAMA_SERVER)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(llama_cpp, "SOURCES", tmp_path)
    with llama_cpp.llama_server_over_rpc(tmp_path / "model.gguf", tmp_path / "server.log", 1, 3) as (_, pids):
        assert len(pids) == 4


def test_vllm_starts_beside_a_module_of_its_name_and_ends_with_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "vllm.py").write_text(STAND_IN_VLLM)
    python = tmp_path / ".vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    with vllm.running_vllm("vLLM", Path("model"), tmp_path / "log") as contender:

        async def answer() -> Measurement:
            return await contender.answer([Request("a", (1,), 8), Request("b", (1, 2), 5)])

        assert asyncio.run(answer()).tokens == 13
        engine = int((tmp_path / "engine").read_text())
        assert alive(engine)
    wait_until(lambda: not alive(engine), timeout_seconds=30)


def findings(did_not_run: dict[str, str], measured: tuple[str, ...]) -> Findings:
    results = {name: [Measurement(1.0, 100, [0.1], [0.01])] for name in measured}
    return Findings({SINGLE: results, PREFILL: results}, {}, did_not_run)


def test_the_report_of_a_run_without_a_peer() -> None:
    found = findings({LLAMA_CPP: WHY}, (BF16,))
    assert [(verdict.what, verdict.word) for verdict in verdicts(found)] == [
        ("single stream, q4, × llama.cpp", "not measurable"),
        ("16 concurrent, best dtype, × llama.cpp", "not measurable"),
        ("prefill of 1k, best dtype, × llama.cpp", "not measurable"),
    ]
    text = markdown(found, [], "serving.png")
    assert "| prefill of 1k, best dtype, × llama.cpp | ≥ 5.00 | – | not measurable |" in text
    assert text.count(f"| {LLAMA_CPP} did not run: {WHY} | – | – | – | – | – | – |") == 2


def test_the_report_of_a_run_with_a_peer() -> None:
    found = findings({}, (BF16, LLAMA_CPP))
    assert [(verdict.seen, verdict.word) for verdict in verdicts(found)] == [("1.00", "missed")]
    assert "did not run" not in markdown(found, [], "serving.png")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ContenderEnded("its process has ended", Path("log")), "its process has ended"),
        (TimeoutError(), "it did not answer in time"),
    ],
)
def test_a_peer_that_ends_on_the_way_costs_the_others_nothing(error: Exception, why: str) -> None:
    asked = 0

    async def answers(requests: Sequence[Request]) -> Measurement:
        return Measurement(1.0, 100, [0.1], [0.01])

    async def ends_in_the_second_round(requests: Sequence[Request]) -> Measurement:
        nonlocal asked
        asked += 1
        if asked > 2:  # the first time warms up
            raise error
        return await answers(requests)

    failed: dict[str, str] = {}
    contenders = [Contender("ends", (), ends_in_the_second_round), Contender("stays", (), answers)]
    work = {SINGLE: [Request("a", (1,), 8)]}
    results = asyncio.run(measure_all(contenders, work, 3, print, failed, rest_seconds=0))
    assert {name: len(measured) for name, measured in results[SINGLE].items()} == {"ends": 1, "stays": 3}
    assert failed == {"ends": why}
    assert asked == 3
