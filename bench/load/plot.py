"""Draws a load run in four panels over time: conversations, replicas, tokens a second, and time to first token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.load.series import Answer, Failure, Record, Replicas, Second, percentile, phases

_WINDOW_SECONDS: Final = 10.0


def draw(records: Sequence[Record], picture: Path, title: str) -> None:
    figure = Figure(figsize=(10, 10), layout="constrained")
    load, replicas, throughput, first_token = figure.subplots(4, 1, sharex=True)
    seconds = [record for record in records if isinstance(record, Second)]
    _draw_load(load, records, seconds)
    _draw_replicas(replicas, records)
    throughput.plot([each.t for each in seconds], [each.tokens for each in seconds])
    answers = [record for record in records if isinstance(record, Answer)]
    first_token.plot([each.t for each in seconds], [percentile(_recent_waits(answers, each.t), 0.95) for each in seconds])
    named = {
        "conversations": load,
        "ready replicas": replicas,
        "tokens/s": throughput,
        "time to first token,\np95 of 10 s (s)": first_token,
    }
    for name, panel in named.items():
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    first_token.set_xlabel("seconds")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _draw_load(panel: Any, records: Sequence[Record], seconds: Sequence[Second]) -> None:
    times, counts = [0.0], [0]
    for phase, end in phases(records):
        times += [phase.t, end]
        counts += [phase.conversations, phase.conversations]
    panel.plot(times, counts, color="black", label="wanted")
    panel.plot([each.t for each in seconds], [each.in_flight for each in seconds], alpha=0.6, label="in flight")
    failed = [record.t for record in records if isinstance(record, Failure)]
    panel.plot(failed, [0.0] * len(failed), "rx", label=f"failed ({len(failed)})")
    panel.legend(loc="upper left")


def _draw_replicas(panel: Any, records: Sequence[Record]) -> None:
    by_service: dict[str, dict[float, float]] = {}
    for record in records:
        if isinstance(record, Replicas):
            by_time = by_service.setdefault(record.service, {})
            by_time[record.t] = by_time.get(record.t, 0.0) + record.ready
    for service, by_time in sorted(by_service.items()):
        panel.step(list(by_time), list(by_time.values()), where="post", label=service)
    if by_service:
        panel.legend(loc="upper left")


def _recent_waits(answers: Sequence[Answer], t: float) -> list[float]:
    """Times to the first tokens that came in the last seconds before `t`."""
    return [
        answer.time_to_first_token_seconds
        for answer in answers
        if t - _WINDOW_SECONDS < answer.started + answer.time_to_first_token_seconds <= t
    ]
