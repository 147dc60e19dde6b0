"""Judging a soak from its records: every miss is found, and a fault excuses its own consequences only."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.records import Record, Recorder, of
from bench.soak.attacks import KINDS
from bench.soak.faults import answers, victims_at
from bench.soak.honest import QUESTIONS
from bench.soak.judge import growths, late, unexplained, verdicts, wrong
from bench.soak.observe import Observer
from bench.soak.records import (
    GATEWAY,
    STORE,
    Answer,
    Attempt,
    Began,
    Ended,
    Fault,
    Health,
    Lost,
    Lull,
    Plan,
    Reference,
    Refused,
    Rest,
    Usage,
    read_records,
)
from bench.soak.report import draw, markdown
from bench.soak.target import function_ports

SERVICES = (GATEWAY, "stage 0", "stage 1")
SECONDS = 900.0
ROUND = 60.0
MIB = 2**20
RUNNING, WAITING = "lamina_gateway_running_sequences", "lamina_gateway_waiting_sequences"
FREE, HELD = "lamina_stage_free_tokens", "lamina_stage_sequences"


def rest(t: float, moment: Any) -> list[Record]:
    stages = [Rest(t, moment, stage, {FREE: 4096.0, HELD: 0.0}) for stage in SERVICES[1:]]
    return [Rest(t, moment, GATEWAY, {RUNNING: 0.0, WAITING: 0.0}), *stages]


def usages() -> list[Record]:
    """Up and down with the hostile clients, and the same at every lull; the memory for KV fills."""
    found: list[Record] = []
    for second in range(10, 910):
        busy = (second - 10) % ROUND < 40
        for pid, service in enumerate(SERVICES):
            kv = 0 if service == GATEWAY else second * MIB // 8
            resident = (300 if busy else 200) * MIB + kv
            found.append(Usage(second, service, pid, 700 if busy else 40, 900 if busy else 30, resident, kv))
    return found


def records() -> list[Record]:
    """The records of a soak that met all targets."""
    return [
        Reference(1, "one", "a b", (7, 8), 2),
        *rest(9, "before"),
        Began(10, SECONDS, SERVICES, "a model", 4, 6.0, tuple(kind.name for kind in KINDS)),
        *(Attempt(50, kind.name, 1.0, {"400": 2}) for kind in KINDS),
        *(Lull(10 + number * ROUND + 40, 10 + (number + 1) * ROUND) for number in range(15)),
        *(Fault(20 + number * 10, "kill", "stage 0", 20 + number * 10) for number in range(40)),
        *(Fault(30 + number, "hang", "stage 1", 50 + number) for number in range(4)),
        Fault(300, "away", STORE, 320),
        *(Health(second, service, 200, 0.02) for second in range(10, 910) for service in SERVICES),
        *usages(),
        Answer(40, "one", "event", 35, "a b", 2, (7, 8), 1),
        Answer(45, "one", "openai", 40, "a b", 2),
        Refused(46, "openai", 429, "1"),
        Ended(21, "stage 0", "killed by SIGKILL"),
        *rest(920, "after"),
    ]


def failing(changed: list[Record]) -> list[str]:
    return [verdict.what for verdict in verdicts(changed) if not verdict.met]


def test_a_soak_that_meets_all_targets() -> None:
    assert failing(records()) == []
    text = markdown(records())
    assert "missed" not in text
    assert "| event | 1 | 1 | 5.0 s | 5.0 s | never | 0 |" in text
    assert "| openai | 1 | 0 | 5.0 s | 5.0 s | 429 1 × | 0 |" in text
    assert f"| {KINDS[0].name} | 1 | 400 2 × |" in text
    assert "| gateway | 10 | 40 | +0.0 | 30 | +0.0 | 200 | +0.0 |" in text


@dataclass(frozen=True)
class Spoilt:
    """A soak with one miss, and the verdict that reports it."""

    what: str
    change: Callable[[Record], list[Record]]


def more(*extra: Record) -> Callable[[Record], list[Record]]:
    return lambda record: [record, *extra] if isinstance(record, Began) else [record]


def without(kind: type[Record], where: Callable[[Any], bool] = lambda _: True) -> Callable[[Record], list[Record]]:
    return lambda record: [] if isinstance(record, kind) and where(record) else [record]


def replaced(kind: type[Record], where: Callable[[Any], bool], **fields: Any) -> Callable[[Record], list[Record]]:
    return lambda record: (
        [msgspec.structs.replace(record, **fields)] if isinstance(record, kind) and where(record) else [record]
    )


def leaking(quantity: str, of_a_second: float, service: str = GATEWAY) -> Callable[[Record], list[Record]]:
    def change(record: Record) -> list[Record]:
        if not isinstance(record, Usage) or record.service != service:
            return [record]
        return [msgspec.structs.replace(record, **{quantity: getattr(record, quantity) + int(record.t * of_a_second)})]

    return change


SPOILT = {
    "another text": Spoilt("token for token", more(Answer(50, "one", "openai", 48, "a c", 2))),
    "other tokens of the same text": Spoilt("token for token", more(Answer(50, "one", "event", 48, "a b", 2, (7, 9)))),
    "a token less": Spoilt("token for token", more(Answer(50, "one", "openai", 48, "a b", 1))),
    "a question never taken": Spoilt("token for token", more(Answer(50, "two", "openai", 48, "a b", 2))),
    "no answers": Spoilt("token for token", without(Answer)),
    "lost": Spoilt("is lost", more(Lost(50, "one", "event", 48, "500"))),
    "refused without a time": Spoilt("Retry-After", more(Refused(50, "event", 503, None))),
    "still running": Spoilt("nothing runs", replaced(Rest, lambda r: r.moment == "after", gauges={RUNNING: 1.0, FREE: 4096.0})),
    "still held": Spoilt(
        "nothing runs",
        replaced(Rest, lambda r: r.moment == "after" and r.service == "stage 1", gauges={FREE: 4096.0, HELD: 1.0}),
    ),
    "does not answer afterwards": Spoilt(
        "nothing runs", replaced(Rest, lambda r: r.moment == "after" and r.service == GATEWAY, gauges={})
    ),
    "less memory": Spoilt(
        "keys and values", replaced(Rest, lambda r: r.moment == "after" and r.service == "stage 1", gauges={FREE: 4000.0})
    ),
    "threads": Spoilt("threads of every process", leaking("threads", 0.02)),
    "descriptors": Spoilt("descriptors of every process", leaking("descriptors", 0.05, "stage 0")),
    "memory": Spoilt("resident memory, without", leaking("resident_bytes", MIB / 20, "stage 1")),
    "memory of the gateway": Spoilt("resident memory, without", leaking("resident_bytes", MIB / 20)),
    "a process never seen": Spoilt("threads of every process", without(Usage, lambda r: r.service == "stage 1")),
    "late": Spoilt("/healthz", more(Health(500, GATEWAY, 200, 1.2))),
    "sick": Spoilt("/healthz", more(Health(500, GATEWAY, 503, 0.1))),
    "never asked": Spoilt("/healthz", without(Health)),
    "the gateway ended": Spoilt("that was not killed", more(Ended(21, GATEWAY, "OOMKilled"))),
    "a stage ended by itself": Spoilt("that was not killed", more(Ended(700, "stage 1", "killed by SIGSEGV"))),
    "an invalid request breaks something": Spoilt(
        "neither served nor break", more(Attempt(50, "broken JSON", 1.0, {"500": 1}))
    ),
    "an invalid request that is served": Spoilt("neither served nor break", more(Attempt(50, "a wrong key", 1.0, {"200": 1}))),
    "no kills": Spoilt("disturbed as planned", without(Fault, lambda r: r.fault == "kill")),
    "the store was there": Spoilt("disturbed as planned", without(Fault, lambda r: r.fault == "away")),
    "a kind that did not come": Spoilt("disturbed as planned", without(Attempt, lambda r: r.name == KINDS[3].name)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_every_miss_is_reported(name: str) -> None:
    spoilt = SPOILT[name]
    changed = [each for record in records() for each in spoilt.change(record)]
    assert any(spoilt.what in what for what in failing(changed)), failing(changed)
    assert "missed" in markdown(changed)


def test_only_misses_are_reported() -> None:
    assert len(failing([*records(), Lost(50, "one", "event", 48, "500")])) == 1
    assert len(wrong([*records(), Answer(50, "one", "openai", 48, "a c", 2)])) == 1


def test_an_answer_to_a_valid_hostile_request_is_no_miss() -> None:
    assert failing([*records(), Attempt(50, "leaves in a stream", 1.0, {"200, left": 1, "500": 1})]) == []


@pytest.mark.parametrize(
    ("health", "excused"),
    [
        (Health(25, "stage 0", 0, 10.0), True),  # killed meanwhile
        (Health(33, "stage 1", 0, 10.0), True),  # stopped
        (Health(600, "stage 1", 0, 10.0), False),
        (Health(330, "stage 1", 0, 0.1), True),  # nothing to start from
        (Health(310, GATEWAY, 200, 1.1), False),  # needs no store
        (Health(25, GATEWAY, 200, 1.1), False),
    ],
)
def test_a_broken_process_need_not_be_healthy(health: Health, excused: bool) -> None:
    assert (health not in late([*records(), health])) is excused


def test_a_stage_may_end_when_it_is_killed_or_has_no_store() -> None:
    fine = [Ended(315, "stage 1", "exit status 1"), Ended(25, "stage 0", "killed by SIGKILL")]
    strange = [Ended(60, "stage 1", "killed by SIGSEGV"), Ended(315, GATEWAY, "exit status 1")]
    assert unexplained([*records(), *fine, *strange]) == strange


def test_processes_are_compared_at_lulls_of_the_last_two_thirds() -> None:
    """The first third's warm-up and the use by hostile clients count as no growth."""
    seen = records()
    early = [Usage(t, GATEWAY, 9, 5, 5, MIB) for t in range(10, 300)]
    assert {(growth.service, growth.pid) for growth in growths([*early, *seen])} == {
        (GATEWAY, 0),
        ("stage 0", 1),
        ("stage 1", 2),
    }
    assert {growth.lulls for growth in growths(seen)} == {10}
    young = [Usage(t, "stage 0", 77, t, t, t * MIB) for t in range(790, 905)]
    assert 77 not in {growth.pid for growth in growths([*seen, *young])}


def test_each_third_has_its_victims() -> None:
    stages = ["stage 0", "stage 1", "stage 2"]
    assert [victims_at(share, stages) for share in (0.1, 0.5, 0.9)] == [stages, ["stage 0"], ["stage 2"]]


def test_records_of_several_processes_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "soak.jsonl"
    with Recorder(path) as one, Recorder(path, one.started) as other:
        for number, record in enumerate(records()):
            (one if number % 2 else other).write(record)
    found = read_records(path)
    assert answers(str(path)) == len(of(Answer, found)) > 0
    assert failing(found) == []
    assert markdown(found) == markdown(sorted(records(), key=lambda record: record.t))
    picture = tmp_path / "soak.png"
    draw(found, picture, "a soak")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_text_of_a_model_does_not_break_the_table() -> None:
    text = markdown([*records(), Answer(50, "one", "openai", 48, "a |\n| c <b>", 2)])
    assert all(line.startswith("|") or not line for line in text.splitlines())
    assert "<b>" not in text


def test_a_short_soak_has_rounds_too() -> None:
    rounds = {minutes: plan(minutes * 60).round_seconds for minutes in (1, 2, 15, 60)}
    assert rounds == {1: 15, 2: 15, 15: 60, 60: 60}


def plan(seconds: float, services: dict[str, str] | None = None) -> Plan:
    clients = {"honest_key": "h", "hostile_key": "x", "honest": 1}
    urls = {"url": "http://h:1", "admin_url": "http://h:2"}
    return Plan(records="r", started=0, seconds=seconds, services=services or {}, model="m", **urls, **clients)


def test_ports_of_functions_are_read_from_the_status() -> None:
    def service(name: str, *ports: int | None) -> dict[str, Any]:
        return {"name": name, "revisions": [{"pods": [{"function_port": port} for port in ports]}]}

    status = {"services": [service("soak", 1), service("soak-1-s0", 2), service("soak-1-s1", None), service("other", 4)]}
    names = {GATEWAY: "soak", "stage 0": "soak-1-s0", "stage 1": "soak-1-s1"}
    assert function_ports(status, names) == {GATEWAY: 1, "stage 0": 2}


def test_names_of_questions_and_clients_are_unique() -> None:
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {question.temperature > 0 for question in QUESTIONS} == {True, False}
    assert of(Began, records())[0].hostile == tuple(kind.name for kind in KINDS)


def test_the_gauges_before_are_recorded_when_nothing_is_held() -> None:
    """Otherwise memory that the last question held would look freed afterwards."""
    observer = Observer(platform=None, plan=plan(60, dict.fromkeys(SERVICES, "")), recorder=None)  # type: ignore[arg-type]
    idle = {GATEWAY: {RUNNING: 0.0, WAITING: 0.0}, "stage 0": {FREE: 4.0, HELD: 0.0}, "stage 1": {FREE: 4.0, HELD: 0.0}}
    assert observer._rests(idle, None)
    assert not observer._rests({**idle, "stage 1": {FREE: 3.0, HELD: 1.0}}, None)
    assert not observer._rests({**idle, "stage 1": {}}, None)
    assert not observer._rests({GATEWAY: idle[GATEWAY]}, None)
    assert not observer._rests({**idle, "stage 1": {FREE: 3.0, HELD: 0.0}}, idle)


_LEAKS = """
import os, sys, threading
kept, quantity = [], sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    if quantity == "threads":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    elif quantity == "descriptors":
        kept += os.pipe()
    elif quantity == "own_bytes":
        kept.append(b"x" * 2**20)
    print("done", flush=True)
"""


@pytest.mark.parametrize("leaked", ["threads", "descriptors", "own_bytes", "nothing"])
def test_a_process_that_leaks_is_found_and_no_other(leaked: str, tmp_path: Path) -> None:
    """Observed 28 times as in a soak; only the clock is simulated."""
    command = [sys.executable, "-c", _LEAKS, leaked]
    with (
        Recorder(tmp_path / "soak.jsonl") as recorder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        observer = Observer(platform=None, plan=plan(60), recorder=recorder)  # type: ignore[arg-type]
        for _ in range(28):
            print(file=process.stdin, flush=True)
            process.stdout.readline()
            observer._look(GATEWAY, {"restarts": 0, "name": "it", "pid": process.pid})
        process.stdin.close()
    looks = of(Usage, read_records(tmp_path / "soak.jsonl"))
    began = Began(0, 900, (GATEWAY,), "a model", 4, 6.0)
    at_lulls = [msgspec.structs.replace(look, t=number * 30.0 + 29) for number, look in enumerate(looks)]
    lulls = [Lull(number * 30.0, number * 30.0 + 30) for number in range(28)]
    found = growths([began, *at_lulls, *lulls])
    assert [growth.quantity for growth in found if growth.grown > growth.allowed] == [leaked] * (leaked != "nothing")
