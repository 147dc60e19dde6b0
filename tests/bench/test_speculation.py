"""The report of the speculation benchmark, and its emulated network."""

import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bench.speculation import report
from bench.speculation.answers import Answered
from bench.speculation.delay import delayed
from bench.speculation.report import Pair, Setting, markdown, wanted


def answered(seconds: float, *texts: str) -> Answered:
    return Answered(seconds, texts, prompt_tokens=50, tokens=100, accepted=30, rejected=10)


def test_ratios_compare_turns_pairwise_and_different_answers_are_counted() -> None:
    pair = Pair([answered(1.0, "a", "b"), answered(2.0, "a", "c")], [answered(2.0, "a", "b"), answered(6.0, "a", "b")])
    assert pair.ratio == pytest.approx(2.5)
    assert pair.different == 1


def test_the_table_has_accepted_drafts_and_the_throughput_that_a_network_leaves() -> None:
    pair = Pair([replace(answered(1.0, "a"), cpu_seconds=0.5)], [replace(answered(2.0, "a"), cpu_seconds=2.0)])
    slow = Pair([answered(2.0, "a")], [answered(4.0, "a")])
    text = markdown({Setting("int8", "quoting", 16, 0.0): pair, Setting("int8", "quoting", 16, 0.005): slow}, "facts")
    assert "| int8 | quoting | 16 | 0 ms | 1 | 50.0 | 100.0 | 2.00 (2.00–2.00) | 4.00 | 0.97 | 30 of 40 (75%) | 0 |" in text
    assert "5 ms each way leave 0.50 of the throughput without them" in text


def test_targets_depend_on_the_questions_and_the_network() -> None:
    assert wanted(Setting("int8", "quoting", 1, 0.0)) == 1.8
    assert wanted(Setting("int8", "quoting", 1, 0.005)) == 2.0
    assert wanted(Setting("int8", "free", 1, 0.0)) == wanted(Setting("int8", "quoting", 16, 0.0)) == 0.97


def test_there_are_twenty_questions_of_each_kind() -> None:
    sets = yaml.safe_load(Path(report.__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
    assert {name: len(set(questions)) for name, questions in sets.items()} == {"quoting": 20, "free": 20}


def test_both_directions_are_delayed_and_bytes_arrive_in_order() -> None:
    sent = bytes(range(256)) * 4096
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(2**16):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        with delayed([f"http://127.0.0.1:{listener.getsockname()[1]}"], 0.05) as (url,):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client:
                began = time.perf_counter()
                threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR))).start()
                got = b"".join(iter(lambda: client.recv(2**16), b""))
                seconds = time.perf_counter() - began
            thread.join(30)
    assert got == sent
    assert seconds >= 0.1


def test_a_network_ends_without_log_lines_while_bytes_are_under_way(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio would log the exception of a cancelled connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with delayed([f"http://127.0.0.1:{listener.getsockname()[1]}"], 60.0) as (url,):
            client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)
            client.sendall(b"never to arrive")
            upstream, _ = listener.accept()
        upstream.close()
        client.close()
    assert not caplog.records
