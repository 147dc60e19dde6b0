"""The tables of a soak in the documentation."""

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from bench.records import Record, of
from bench.report import table
from bench.soak.judge import verdicts
from bench.soak.records import Answer, Attempt, Broken, Health, Lost, Refused, Resources, Rest, Usage


def markdown(records: Sequence[Record]) -> str:
    """Tables of targets, answers, hostile clients, health, and resources of processes."""
    cells = ([each.what, each.wanted, _cell(each.seen), each.word] for each in verdicts(records))
    targets = table(["target", "wanted", "seen", ""], cells)
    clients = _answers(records, "client", lambda each: each.client)
    apis = _answers(records, "API", lambda each: each.api)
    return "\n\n".join([targets, clients, apis, _hostile(records), _health(records), _processes(records)])


def _answers(records: Sequence[Record], column: str, name: Callable[[Answer | Broken | Refused | Lost], str]) -> str:
    """A row for each name of those who asked."""
    answers, broken, refusals, lost = of(Answer, records), of(Broken, records), of(Refused, records), of(Lost, records)
    rows = []
    for row in sorted({name(each) for kind in (answers, broken, refusals, lost) for each in kind}):
        mine = [answer for answer in answers if name(answer) == row]
        seconds = [answer.t - answer.started for answer in mine]
        waits = [f"{median(seconds):.1f} s", f"{max(seconds):.1f} s"] if seconds else ["", ""]
        told = Counter(str(refusal.status) for refusal in refusals if name(refusal) == row)
        counts = [sum(name(each) == row for each in kind) for kind in (broken, lost)]
        rows.append([row, len(mine), sum(answer.replays for answer in mine), *waits, _counted(told), *counts])
    columns = ["answers", "replays in them", "p50", "longest", "told to come again", "broken", "lost"]
    return table([column, *columns], rows)


def _hostile(records: Sequence[Record]) -> str:
    rows = []
    for name in sorted({attempt.name for attempt in of(Attempt, records)}):
        mine = [attempt.outcomes for attempt in of(Attempt, records) if attempt.name == name]
        outcomes: Counter[str] = Counter()
        for each in mine:
            outcomes.update(each)
        rows.append([name, len(mine), _counted(outcomes)])
    return table(["hostile client", "times", "outcomes"], rows)


def _health(records: Sequence[Record]) -> str:
    rows = []
    for service in sorted({health.service for health in of(Health, records)}):
        mine = [health for health in of(Health, records) if health.service == service]
        seconds = [health.seconds for health in mine if health.status]
        waits = [f"{median(seconds) * 1000:.0f} ms", f"{max(seconds):.2f} s"] if seconds else ["", ""]
        rows.append([service, len(mine), *waits, sum(health.status != 200 for health in mine)])
    return table(["`/healthz` of", "asked", "p50", "longest", "not answered with 200"], rows)


def _processes(records: Sequence[Record]) -> str:
    """A row for each process, at rest before and after the disturbance, with the peak of all processes of this name."""
    peaks: dict[str, int] = {}
    for usage in of(Usage, records):
        peaks[usage.service] = max(peaks.get(usage.service, 0), usage.uses.peak_bytes)
    rests: dict[str, list[Resources]] = {}
    for rest in of(Rest, records):
        if rest.uses is not None:
            rests.setdefault(rest.service, []).append(rest.uses)
    rows = []
    for service, uses in sorted(rests.items()):
        threads, descriptors = ([getattr(each, name) for each in uses] for name in ("threads", "descriptors"))
        memory = [f"{each.own_bytes / 2**20:.0f}" for each in uses]
        cells = [" → ".join(map(str, each)) for each in (threads, descriptors, memory)]
        rows.append([service, *cells, f"{peaks.get(service, 0) / 2**20:.0f}"])
    memory_column = "resident MiB without keys and values, and mapped files"
    return table(["process at rest", "threads", "descriptors", memory_column, "peak MiB, with them"], rows)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count} ×" for name, count in sorted(counts.items())) or "never"


def _cell(text: str) -> str:
    """Text of a model or a log, escaped for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
