"""The section of the documentation that tells a soak."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from bench.soak.growth import growths
from bench.soak.hostile import KINDS
from bench.soak.judge import Verdict, judge
from bench.soak.records import Answer, Attempt, Health, Lost, Record, Refused, of

REFUSED_KINDS = frozenset(kind.name for kind in KINDS if kind.refused)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    return judge(records, REFUSED_KINDS)


def markdown(records: Sequence[Record]) -> str:
    """Tables: what must show, honest answers, hostile clients, health, growth of processes."""
    lines = ["| must show | seen | |", "|---|---|---|"]
    lines += [f"| {each.what} | {_cell(each.seen)} | {'yes' if each.holds else '**no**'} |" for each in verdicts(records)]
    return "\n".join([*lines, *_honest(records), *_hostile(records), *_health(records), *_processes(records)])


def _honest(records: Sequence[Record]) -> list[str]:
    lines = [
        "",
        "| honest clients' door | answers | replays in them | p50 | longest | told to come again | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    answers, refusals, lost = of(Answer, records), of(Refused, records), of(Lost, records)
    for door in sorted({each.door for each in answers} | {each.door for each in refusals} | {each.door for each in lost}):
        mine = [answer for answer in answers if answer.door == door]
        seconds = [answer.t - answer.started for answer in mine]
        waits = f"{median(seconds):.1f} s | {max(seconds):.1f} s" if seconds else " | "
        told = Counter(str(refusal.status) for refusal in refusals if refusal.door == door)
        lines.append(
            f"| {door} | {len(mine)} | {sum(answer.replays for answer in mine)} | {waits} | {_counted(told)} "
            f"| {sum(each.door == door for each in lost)} |"
        )
    return lines


def _hostile(records: Sequence[Record]) -> list[str]:
    lines = ["", "| hostile client | times | what became of it |", "|---|---|---|"]
    attempts = of(Attempt, records)
    for name in dict.fromkeys(attempt.name for attempt in sorted(attempts, key=lambda attempt: attempt.name)):
        mine = [attempt for attempt in attempts if attempt.name == name]
        outcomes: Counter[str] = Counter()
        for attempt in mine:
            outcomes.update(attempt.outcomes)
        lines.append(f"| {name} | {len(mine)} | {_counted(outcomes)} |")
    return lines


def _health(records: Sequence[Record]) -> list[str]:
    lines = ["", "| `/healthz` of | asked | p50 | longest | not answered with 200 |", "|---|---|---|---|---|"]
    asked = of(Health, records)
    for service in sorted({health.service for health in asked}):
        mine = [health for health in asked if health.service == service]
        seconds = [health.seconds for health in mine if health.status]
        waits = f"{median(seconds) * 1000:.0f} ms | {max(seconds):.2f} s" if seconds else " | "
        lines.append(f"| {service} | {len(mine)} | {waits} | {sum(health.status != 200 for health in mine)} |")
    return lines


def _processes(records: Sequence[Record]) -> list[str]:
    """Threads, descriptors and memory of each process that lived long enough, in a row."""
    lines = [
        "",
        "| process | lulls | threads | grown | descriptors | grown | resident MiB without keys and values | grown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_process: dict[tuple[str, int], list[str]] = {}
    for growth in growths(records):
        factor = 2**-20 if growth.quantity == "own_bytes" else 1
        cells = by_process.setdefault((growth.service, growth.pid), [str(growth.lulls)])
        cells += [f"{growth.level * factor:.0f}", f"{growth.grown * factor:+.1f}"]
    return lines + [f"| {service} | {' | '.join(cells)} |" for (service, _), cells in sorted(by_process.items())]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count} ×" for name, count in sorted(counts.items())) or "never"


def _cell(text: str) -> str:
    """As one cell of a table: what a model or a log says may hold anything."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
