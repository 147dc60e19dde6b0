"""The tables and the picture of a soak in the documentation."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.figure import Figure

from bench.records import Record, of
from bench.report import table
from bench.soak.judge import HEALTHY_SECONDS, verdicts
from bench.soak.records import Answer, Attempt, Began, Broken, Fault, Health, Lost, Refused, Resources, Rest, Usage

_BIN_SECONDS: Final = 10.0
_COLORS: Final = {"kill": "tab:red", "hang": "tab:purple", "away": "tab:orange"}


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


def draw(records: Sequence[Record], picture: Path, title: str) -> None:
    figure = Figure(figsize=(10, 12), layout="constrained")
    panels = figure.subplots(5, 1, sharex=True)
    _draw_answers(panels[0], records)
    for service in sorted({health.service for health in of(Health, records)}):
        mine = [health for health in of(Health, records) if health.service == service]
        panels[1].plot([health.t for health in mine], [health.seconds for health in mine], ".", markersize=3, label=service)
    panels[1].axhline(HEALTHY_SECONDS, color="black", linewidth=0.8)
    panels[1].set_ylabel("/healthz (s)")
    _draw_usage(panels[2], records, "threads", lambda uses: uses.threads)
    _draw_usage(panels[3], records, "descriptors", lambda uses: uses.descriptors)
    _draw_usage(panels[4], records, "resident MiB\nwithout keys and values", lambda uses: uses.own_bytes / 2**20)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
        panel.legend(loc="upper left")
    for began in of(Began, records):
        panels[-1].set_xlim(left=began.t)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _draw_answers(panel: Any, records: Sequence[Record]) -> None:
    times = [answer.t for answer in of(Answer, records)]
    bins = [start * _BIN_SECONDS for start in range(int(max(times, default=0.0) / _BIN_SECONDS) + 2)]
    panel.hist(times, bins=bins, color="lightgray", label="answers in 10 s")
    for kind, color in _COLORS.items():
        faults = [fault for fault in of(Fault, records) if fault.fault == kind]
        for number, fault in enumerate(faults):
            label = f"{kind} ({len(faults)})" if number == 0 else None
            panel.axvspan(fault.t, max(fault.until, fault.t + 0.5), color=color, alpha=0.4, linewidth=0, label=label)
    lost = [each.t for each in of(Lost, records)]
    panel.plot(lost, [0.0] * len(lost), "rx", label=f"lost ({len(lost)})")
    panel.set_ylabel("answers, faults")


def _draw_usage(panel: Any, records: Sequence[Record], name: str, value: Callable[[Resources], float]) -> None:
    """A line for each service, with a gap between its processes."""
    for service in sorted({usage.service for usage in of(Usage, records)}):
        points: list[tuple[float, float]] = []
        pid = None
        for usage in of(Usage, records):
            if usage.service == service:
                if pid is not None and usage.pid != pid:
                    points.append((usage.t, float("nan")))
                pid = usage.pid
                points.append((usage.t, value(usage.uses)))
        panel.plot([t for t, _ in points], [each for _, each in points], linewidth=1, label=service)
    panel.set_ylabel(name)
