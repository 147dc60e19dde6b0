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
from bench.soak.attacks import KINDS, OPENED_A_TURN
from bench.soak.faults import answers, victims_at
from bench.soak.honest import QUESTIONS
from bench.soak.judge import GATEWAY_PEAK_BYTES, VERDICTS, has_returned, late, unexcused, unexplained, verdicts, wrong
from bench.soak.observe import Observer, read_resources
from bench.soak.records import (
    GATEWAY,
    GREEDY,
    STORE,
    Answer,
    Attempt,
    Began,
    Broken,
    Ended,
    Fault,
    Health,
    Lost,
    Plan,
    Reference,
    Refused,
    Resources,
    Rest,
    Usage,
    named_pods,
    read_records,
)
from bench.soak.report import markdown
from bench.soak.target import SERVED, function_ports

GATEWAYS, STAGES = ("gateway 0", "gateway 1"), ("stage 0", "stage 1")
SERVICES = (*GATEWAYS, *STAGES)
HONEST = ("honest 0", "honest 1")
SECONDS = 900.0
MIB = 2**20
RUNNING, WAITING = "lamina_gateway_running_sequences", "lamina_gateway_waiting_sequences"
FREE, HELD = "lamina_stage_free_tokens", "lamina_stage_sequences"


def resources(**changed: int) -> Resources:
    return Resources(**{"threads": 40, "descriptors": 30, "peak_bytes": 300 * MIB, "resident_bytes": 200 * MIB} | changed)


def rest(t: float, moment: Any) -> list[Record]:
    """Afterwards keys and values have become resident at stages."""
    kv = 0 if moment == "before" else 90 * MIB
    filled = resources(resident_bytes=200 * MIB + kv, kv_bytes=kv)
    stages = [Rest(t, moment, stage, {FREE: 4096.0, HELD: 0.0}, filled) for stage in STAGES]
    return [*(Rest(t, moment, gateway, {RUNNING: 0.0, WAITING: 0.0}, resources()) for gateway in GATEWAYS), *stages]


def answers_of(client: str, count: int) -> list[Record]:
    return [Answer(60 + number, client, "one", "event", 55 + number, "a b", 2, (7, 8)) for number in range(count)]


def records() -> list[Record]:
    """The records of a soak that met all targets."""
    return [
        Reference(1, "one", "a b", (7, 8), 2),
        *rest(9, "before"),
        Began(10, SECONDS, SERVICES, "a model", HONEST, 4, 6.0, 60.0, tuple(kind.name for kind in KINDS)),
        *(Attempt(50, kind.name, 1.0, {"400": 2}) for kind in KINDS),
        *(Fault(20 + number * 10, "kill", "stage 0", 20 + number * 10) for number in range(40)),
        *(Fault(70 + number * 60, "kill", "gateway 0", 78 + number * 60) for number in range(14)),
        *(Fault(30 + number, "hang", "stage 1", 50 + number) for number in range(4)),
        Fault(300, "away", STORE, 320),
        *(Health(second, service, 200, 0.02) for second in range(10, 910) for service in SERVICES),
        *(Usage(second, service, pid, resources()) for second in range(10, 910) for pid, service in enumerate(SERVICES)),
        Answer(40, "honest 0", "one", "event", 35, "a b", 2, (7, 8), 1),
        Answer(45, "honest 0", "one", "openai", 40, "a b", 2),
        *answers_of("honest 0", 4),
        *answers_of("honest 1", 5),
        *answers_of(GREEDY, 10),
        Broken(71, "honest 1", "one", "openai", "gateway 0", 69, "502"),
        Answer(76, "honest 1", "one", "openai", 69, "a b", 2, broken=1),
        Refused(46, "honest 0", "openai", 429, "1"),
        Ended(21, "stage 0", "killed by SIGKILL"),
        Ended(71, "gateway 0", "killed by SIGKILL"),
        *rest(920, "after"),
    ]


def failing(changed: list[Record]) -> list[str]:
    return [verdict.what for verdict in verdicts(changed) if not verdict.met]


def test_a_soak_that_meets_all_targets() -> None:
    assert failing(records()) == []
    text = markdown(records())
    assert "missed" not in text
    assert "| event | 20 | 1 | 5.0 s | 5.0 s | never | 0 | 0 |" in text
    assert "| honest 0 | 6 | 1 | 5.0 s | 5.0 s | 429 1 × | 0 | 0 |" in text
    assert "| honest 1 | 6 | 0 | 5.0 s | 7.0 s | never | 1 | 0 |" in text
    assert f"| {KINDS[0].name} | 1 | 400 2 × |" in text
    assert "| gateway 0 | 40 → 40 | 30 → 30 | 200 → 200 | 300 |" in text


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


def growing(service: str, **uses: int) -> Callable[[Record], list[Record]]:
    return replaced(Rest, lambda r: r.moment == "after" and r.service == service, uses=resources(**uses))


SPOILT = {
    "another text": Spoilt("token for token", more(Answer(50, GREEDY, "one", "openai", 48, "a c", 2))),
    "another text when asked again": Spoilt("token for token", replaced(Answer, lambda r: r.broken, text="a c")),
    "other tokens of the same text": Spoilt("token for token", more(Answer(50, GREEDY, "one", "event", 48, "a b", 2, (7, 9)))),
    "a token less": Spoilt("token for token", more(Answer(50, GREEDY, "one", "openai", 48, "a b", 1))),
    "a question never taken": Spoilt("token for token", more(Answer(50, GREEDY, "two", "openai", 48, "a b", 2))),
    "no answers": Spoilt("token for token", without(Answer)),
    "broken": Spoilt("its own gateway", more(Broken(50, "honest 0", "one", "event", "gateway 0", 48, "500"))),
    "broken by another's kill": Spoilt("its own gateway", more(Broken(71, "honest 0", "one", "event", "gateway 1", 69, "502"))),
    "lost": Spoilt("no honest question is lost", more(Lost(50, "honest 0", "one", "event", 48, "500"))),
    "a client that starves": Spoilt("gets its share", without(Answer, lambda r: r.client == "honest 0" and r.broken < 1)),
    "a greedy client that gets more": Spoilt("the greedy key", more(*answers_of(GREEDY, 7))),
    "no greedy client": Spoilt("the greedy key", without(Answer, lambda r: r.client == GREEDY)),
    "refused without a time": Spoilt("Retry-After", more(Refused(50, "honest 0", "event", 503, None))),
    "a peak": Spoilt("peak", more(Usage(50, "gateway 1", 1, resources(peak_bytes=GATEWAY_PEAK_BYTES + 1)))),
    "memory of a gateway": Spoilt("memory of every process", growing("gateway 1", resident_bytes=211 * MIB)),
    "memory of a stage": Spoilt("memory of every process", growing("stage 1", resident_bytes=220 * MIB, kv_bytes=9 * MIB)),
    "threads": Spoilt("threads of every process", growing("gateway 1", threads=43)),
    "descriptors": Spoilt("descriptors of every process", growing("stage 0", descriptors=35)),
    "a process that is not there": Spoilt("threads of every process", without(Rest, lambda r: r.service == "stage 1")),
    "still running": Spoilt("nothing runs", replaced(Rest, lambda r: r.moment == "after", gauges={RUNNING: 1.0, FREE: 4096.0})),
    "still held": Spoilt(
        "nothing runs",
        replaced(Rest, lambda r: r.moment == "after" and r.service == "stage 1", gauges={FREE: 4096.0, HELD: 1.0}),
    ),
    "does not answer afterwards": Spoilt(
        "nothing runs", replaced(Rest, lambda r: r.moment == "after" and r.service == "gateway 1", gauges={})
    ),
    "less memory": Spoilt(
        "nothing runs", replaced(Rest, lambda r: r.moment == "after" and r.service == "stage 1", gauges={FREE: 4000.0})
    ),
    "late": Spoilt("/healthz", more(Health(500, "gateway 1", 200, 1.2))),
    "sick": Spoilt("/healthz", more(Health(500, "gateway 1", 503, 0.1))),
    "never asked": Spoilt("/healthz", without(Health)),
    "a gateway ended": Spoilt("that was not killed", more(Ended(71, "gateway 1", "OOMKilled"))),
    "a stage ended by itself": Spoilt("that was not killed", more(Ended(700, "stage 1", "killed by SIGSEGV"))),
    "an invalid request breaks something": Spoilt("not served", more(Attempt(50, "broken JSON", 1.0, {"500": 1}))),
    "an invalid request that is served": Spoilt("not served", more(Attempt(50, "a wrong key", 1.0, {"200": 1}))),
    "a message that opens a turn": Spoilt(
        "not served", more(Attempt(50, "control tokens in a message", 1.0, {"200": 1, OPENED_A_TURN: 1}))
    ),
    "no kills": Spoilt("disturbed as planned", without(Fault, lambda r: r.fault == "kill" and r.service == "stage 0")),
    "no kills of gateways": Spoilt("disturbed as planned", without(Fault, lambda r: r.service == "gateway 0")),
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
    assert len(failing([*records(), Lost(50, "honest 0", "one", "event", 48, "500")])) == 1
    assert len(wrong([*records(), Answer(50, GREEDY, "one", "openai", 48, "a c", 2)])) == 1


def test_an_answer_to_a_valid_hostile_request_is_no_miss() -> None:
    assert failing([*records(), Attempt(50, "vanishes: stream", 1.0, {"200": 1, "503": 1})]) == []


@pytest.mark.parametrize(
    ("health", "excused"),
    [
        (Health(25, "stage 0", 0, 10.0), True),  # killed meanwhile
        (Health(33, "stage 1", 0, 10.0), True),  # stopped
        (Health(600, "stage 1", 0, 10.0), False),
        (Health(330, "stage 1", 0, 0.1), True),  # nothing to start from
        (Health(310, "gateway 1", 200, 1.1), False),  # needs no store
        (Health(25, "gateway 0", 200, 1.1), False),
        (Health(79, "gateway 0", 0, 0.1), True),
        (Health(79, "gateway 1", 200, 1.1), False),
    ],
)
def test_a_broken_process_need_not_be_healthy(health: Health, excused: bool) -> None:
    assert (health not in late([*records(), health])) is excused


def test_a_stage_may_end_when_it_is_killed_or_has_no_store() -> None:
    fine = [Ended(315, "stage 1", "exit status 1"), Ended(25, "stage 0", "killed by SIGKILL")]
    strange = [Ended(60, "stage 1", "killed by SIGSEGV"), Ended(315, "gateway 1", "exit status 1")]
    assert unexplained([*records(), *fine, *strange]) == strange


@pytest.mark.parametrize(
    ("broken", "excused"),
    [
        (Broken(71, "honest 0", "one", "event", "gateway 0", 60, "closed"), True),  # killed while it answered
        (Broken(80, "honest 0", "one", "event", "gateway 0", 79, "502"), True),  # asked before it was known to be away
        (Broken(71, "honest 0", "one", "event", GATEWAY, 60, "502"), True),  # any of them
        (Broken(69, "honest 0", "one", "event", "gateway 0", 60, "closed"), False),  # killed later
        (Broken(110, "honest 0", "one", "event", "gateway 0", 100, "closed"), False),  # asked after it was replaced
        (Broken(71, "honest 0", "one", "event", "gateway 1", 60, "closed"), False),
    ],
)
def test_an_answer_breaks_only_with_its_own_gateway(broken: Broken, excused: bool) -> None:
    assert (broken not in unexcused([*records(), broken])) is excused


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


def test_text_of_a_model_does_not_break_the_table() -> None:
    text = markdown([*records(), Answer(50, GREEDY, "one", "openai", 48, "a |\n| c <b>", 2)])
    assert all(line.startswith("|") or not line for line in text.splitlines())
    assert "<b>" not in text


def plan(seconds: float, services: dict[str, str] | None = None) -> Plan:
    urls = {"url": "http://h:1", "admin_url": "http://h:2"}
    return Plan(records="r", started=0, seconds=seconds, services=services or {}, model="m", keys={}, greedy=1, **urls)


def test_pods_are_named_in_the_order_of_the_status() -> None:
    def service(name: str, *ports: int | None) -> dict[str, Any]:
        return {"name": name, "revisions": [{"pods": [{"function_port": port} for port in ports]}]}

    status = {"services": [service("soak", 1, 3), service("soak-1-s0", 2), service("soak-1-s1", None), service("other", 4)]}
    names = {"gateway 0": "soak", "gateway 1": "soak", "gateway 2": "soak", "stage 0": "soak-1-s0", "stage 1": "soak-1-s1"}
    assert [*named_pods(status, names)] == ["gateway 0", "gateway 1", "stage 0", "stage 1"]
    assert function_ports(status, names) == {"gateway 0": 1, "gateway 1": 3, "stage 0": 2}


def test_names_of_questions_and_clients_are_unique() -> None:
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {question.temperature > 0 for question in QUESTIONS} == {True, False}
    assert of(Began, records())[0].hostile == tuple(kind.name for kind in KINDS)


def test_processes_rest_when_nothing_is_held_and_they_are_back_where_they_were() -> None:
    """Otherwise memory that the last question held would look freed afterwards."""
    observer = Observer(platform=None, plan=plan(60, dict.fromkeys(SERVICES, "")), recorder=None)  # type: ignore[arg-type]

    def changed(**fields: Any) -> list[Rest]:
        return [msgspec.structs.replace(each, **fields) if each.service == "stage 1" else each for each in before]

    before = of(Rest, rest(9, "before"))
    assert observer._rests(before, [])
    assert observer._rests(of(Rest, rest(920, "after")), before)
    assert not observer._rests(changed(gauges={FREE: 3.0, HELD: 1.0}), [])
    assert not observer._rests(changed(gauges={}), [])
    assert not observer._rests(before[:1], [])
    assert not observer._rests(changed(gauges={FREE: 3.0, HELD: 0.0}), before)
    assert not observer._rests(changed(uses=resources(threads=60)), before)
    assert not observer._rests(changed(uses=None), before)


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
def test_a_process_that_leaks_has_not_returned(leaked: str) -> None:
    command = [sys.executable, "-c", _LEAKS, leaked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = read_resources(process.pid)
        for _ in range(28):
            print(file=process.stdin, flush=True)
            process.stdout.readline()
        after = read_resources(process.pid)
        process.stdin.close()
    assert before is not None
    assert after is not None
    assert has_returned(before, after) == (leaked == "nothing")
    if leaked != "nothing":
        assert getattr(after, leaked) > getattr(before, leaked)
    assert after.peak_bytes >= after.resident_bytes
    assert read_resources(process.pid) is None


def test_every_verdict_is_about_something_else() -> None:
    found = verdicts(records())
    assert len({verdict.what for verdict in found}) == len(found) == len(VERDICTS)
    assert {kind.never for kind in KINDS} == {"500", SERVED, f"500|{OPENED_A_TURN}"}
