"""llama.cpp as a peer: a report says why it is missing."""

from pathlib import Path

import pytest

from bench import llama_cpp
from bench.pipeline import DidNotStart
from bench.serving.client import Measurement
from bench.serving.contenders import LLAMA_CPP, PREFILL, SINGLE
from bench.serving.report import BF16, Findings, markdown, verdicts

WHY = "llama.cpp is not built: make llama-cpp"


def test_without_a_build_the_peer_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "SOURCES", tmp_path)
    with pytest.raises(DidNotStart) as raised, llama_cpp.llama_server(tmp_path / "model.gguf", tmp_path / "log", 1):
        pass
    assert raised.value.why == WHY


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
