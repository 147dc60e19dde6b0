"""llama.cpp as a peer: the next build is tried if one does not start, and the report says why a peer is missing."""

import os
import sys
from pathlib import Path

import pytest

from bench.pipeline import DidNotStart
from bench.serving.client import Measurement
from bench.serving.contenders import LLAMA_CPP, PREFILL, SINGLE
from bench.serving.peers_llama_cpp import Build, builds_for, running_llama_cpp
from bench.serving.report import BF16, Findings, markdown, verdicts

DIES = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
SERVES = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""
WHY = "pytest ended by signal 4 (Illegal instruction)"


def build(package: str, program: str) -> Build:
    return Build(package, "any", lambda: ([sys.executable, "-c", program], dict(os.environ)))


def test_the_next_build_is_tried_if_one_does_not_start(tmp_path: Path) -> None:
    builds = [build("not-installed-at-all", SERVES), build("pytest", DIES), build("aiohttp", SERVES)]
    with running_llama_cpp("model.gguf", 1, tmp_path, builds) as peer:
        assert peer.build.startswith("aiohttp ")
        assert peer.build.endswith(" (any)")


def test_a_cpu_without_amx_gets_the_build_for_avx2_first() -> None:
    assert [build.instructions for build in builds_for("flags : avx2 amx_bf16 amx_tile fma")] == ["AMX", "AVX2"]
    assert [build.instructions for build in builds_for("flags : avx2 avx512f fma")] == ["AVX2", "AMX"]


def test_the_reason_of_every_failed_build_is_reported(tmp_path: Path) -> None:
    builds = [build("not-installed-at-all", SERVES), build("pytest", DIES)]
    with pytest.raises(DidNotStart) as raised, running_llama_cpp("model.gguf", 1, tmp_path, builds):
        pass
    assert raised.value.why == f"not-installed-at-all is not installed; {WHY}"


def findings(did_not_run: dict[str, str], measured: tuple[str, ...]) -> Findings:
    results = {name: [Measurement(1.0, 100, [0.1], [0.01])] for name in measured}
    return Findings({SINGLE: results, PREFILL: results}, {}, 1e9, {}, "", did_not_run)


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
