"""The tables and the picture of a soak in the documentation."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.figure import Figure

from bench.records import Record, of
from bench.report import table
from bench.soak.judge import HEALTHY_SECONDS, growths, late_lulls, verdicts
from bench.soak.records import Answer, Attempt, Began, Fault, Health, Lost, Refused, Usage

_BIN_SECONDS: Final = 10.0
_COLORS: Final = {"kill": "tab:red", "hang": "tab:purple", "away": "tab:orange"}


def markdown(records: Sequence[Record]) -> str:
    """Tables of targets, honest answers, hostile clients, health, and growth of processes."""
    targets = table(["target", "seen", ""], ([each.what, _cell(each.seen), each.word] for each in verdicts(records)))
    return "\n\n".join([targets, _honest(records), _hostile(records), _health(records), _processes(records)])


def _honest(records: Sequence[Record]) -> str:
    answers, refusals, lost = of(Answer, records), of(Refused, records), of(Lost, records)
    rows = []
    for api in sorted({each.api for kind in (answers, refusals, lost) for each in kind}):
        mine = [answer for answer in answers if answer.api == api]
        seconds = [answer.t - answer.started for answer in mine]
        waits = [f"{median(seconds):.1f} s", f"{max(seconds):.1f} s"] if seconds else ["", ""]
        told = Counter(str(refusal.status) for refusal in refusals if refusal.api == api)
        replays = sum(answer.replays for answer in mine)
        rows.append([api, len(mine), replays, *waits, _counted(told), sum(each.api == api for each in lost)])
    return table(["honest clients' API", "answers", "replays in them", "p50", "longest", "told to come again", "lost"], rows)


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
    """A row for each process that lived long enough."""
    by_process: dict[tuple[str, int], list[str]] = {}
    for growth in growths(records):
        factor = 2**-20 if growth.quantity == "own_bytes" else 1
        cells = by_process.setdefault((growth.service, growth.pid), [growth.service, str(growth.lulls)])
        cells += [f"{growth.level * factor:.0f}", f"{growth.grown * factor:+.1f}"]
    memory = "resident MiB without keys and values"
    columns = ["process", "lulls", "threads", "grown", "descriptors", "grown", memory, "grown"]
    return table(columns, (cells for _, cells in sorted(by_process.items())))


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
    _draw_usage(panels[2], records, "threads", lambda usage: usage.threads)
    _draw_usage(panels[3], records, "descriptors", lambda usage: usage.descriptors)
    _draw_usage(panels[4], records, "resident MiB\nwithout keys and values", lambda usage: usage.own_bytes / 2**20)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
        panel.legend(loc="upper left")
    for panel in panels[2:]:
        for lull in late_lulls(records):
            panel.axvspan(lull.t, lull.until, color="tab:green", alpha=0.12, linewidth=0)
    for began in of(Began, records):
        panels[-1].set_xlim(left=began.t)
    panels[-1].set_xlabel("seconds (green: lulls of the last two thirds, in which processes are compared with themselves)")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _draw_answers(panel: Any, records: Sequence[Record]) -> None:
    times = [answer.t for answer in of(Answer, records)]
    bins = [start * _BIN_SECONDS for start in range(int(max(times, default=0.0) / _BIN_SECONDS) + 2)]
    panel.hist(times, bins=bins, color="lightgray", label="honest answers in 10 s")
    for kind, color in _COLORS.items():
        faults = [fault for fault in of(Fault, records) if fault.fault == kind]
        for number, fault in enumerate(faults):
            label = f"{kind} ({len(faults)})" if number == 0 else None
            panel.axvspan(fault.t, max(fault.until, fault.t + 0.5), color=color, alpha=0.4, linewidth=0, label=label)
    lost = [each.t for each in of(Lost, records)]
    panel.plot(lost, [0.0] * len(lost), "rx", label=f"lost ({len(lost)})")
    panel.set_ylabel("answers, faults")


def _draw_usage(panel: Any, records: Sequence[Record], name: str, value: Callable[[Usage], float]) -> None:
    """A line for each service, with a gap between its processes."""
    for service in sorted({usage.service for usage in of(Usage, records)}):
        points: list[tuple[float, float]] = []
        pid = None
        for usage in of(Usage, records):
            if usage.service == service:
                if pid is not None and usage.pid != pid:
                    points.append((usage.t, float("nan")))
                pid = usage.pid
                points.append((usage.t, value(usage)))
        panel.plot([t for t, _ in points], [each for _, each in points], linewidth=1, label=service)
    panel.set_ylabel(name)
