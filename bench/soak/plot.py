"""Draws a soak: answers and faults, health, and threads, descriptors and memory of every process, over one time axis."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.soak.growth import lulls
from bench.soak.records import Answer, Began, Fault, Health, Lost, Record, Usage, of

_BIN_SECONDS: Final = 10.0
_COLORS: Final = {"kill": "tab:red", "hang": "tab:purple", "away": "tab:orange"}


def draw(records: Sequence[Record], picture: Path, title: str) -> None:
    figure = Figure(figsize=(10, 12), layout="constrained")
    panels = figure.subplots(5, 1, sharex=True)
    _answers(panels[0], records)
    _health(panels[1], records)
    _usage(panels[2], records, "threads", lambda usage: usage.threads)
    _usage(panels[3], records, "descriptors", lambda usage: usage.descriptors)
    _usage(panels[4], records, "resident MiB\nwithout keys and values", lambda usage: usage.own_bytes / 2**20)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    for panel in panels[2:]:
        for lull in lulls(records):
            panel.axvspan(lull.t, lull.until, color="tab:green", alpha=0.12, linewidth=0)
    for began in of(Began, records):
        panels[-1].set_xlim(left=began.t)
    panels[-1].set_xlabel("seconds (green: lulls of the last two thirds, where processes are compared with themselves)")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _answers(panel: Any, records: Sequence[Record]) -> None:
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
    panel.legend(loc="upper left")


def _health(panel: Any, records: Sequence[Record]) -> None:
    for service in sorted({health.service for health in of(Health, records)}):
        mine = [health for health in of(Health, records) if health.service == service]
        panel.plot([health.t for health in mine], [health.seconds for health in mine], ".", markersize=3, label=service)
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_ylabel("/healthz (s)")
    panel.legend(loc="upper left")


def _usage(panel: Any, records: Sequence[Record], name: str, value: Callable[[Usage], float]) -> None:
    """A line for each service; it breaks where another process begins."""
    for service in sorted({usage.service for usage in of(Usage, records)}):
        times: list[float] = []
        values: list[float] = []
        pid = None
        for usage in of(Usage, records):
            if usage.service == service:
                if pid is not None and usage.pid != pid:
                    times.append(usage.t)
                    values.append(float("nan"))
                pid = usage.pid
                times.append(usage.t)
                values.append(value(usage))
        panel.plot(times, values, linewidth=1, label=service)
    panel.set_ylabel(name)
    panel.legend(loc="upper left")
