"""Draws a load run: `python -m bench.load.plot load.jsonl load.png`.

Four panels over one time axis: conversations, replicas of each service, tokens a second, time to first token (p95 of the last
ten seconds). What was recorded is in `bench.load.series`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from matplotlib.figure import Figure

from bench.load.series import Answer, Failure, Record, Replicas, Second, percentile, phases, read_records

_WINDOW_SECONDS: Final = 10.0


@click.command()
@click.argument("records", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--title", default="", help="Above the picture: machine, model, command.")
def main(records: Path, picture: Path, title: str) -> None:
    """Draw the run in RECORDS (JSON lines of bench.load.conversations) into PICTURE."""
    draw(read_records(records), picture, title)


def draw(records: Sequence[Record], picture: Path, title: str) -> None:
    figure = Figure(figsize=(10, 10), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    for panel, (name, fill) in zip(
        panels,
        {
            "conversations": _load,
            "ready replicas": _replicas,
            "tokens/s": _throughput,
            "time to first token,\np95 of 10 s (s)": _first_token,
        }.items(),
        strict=True,
    ):
        fill(panel, records)
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _load(panel: Any, records: Sequence[Record]) -> None:
    times, counts = [0.0], [0]
    for phase, end in phases(records):
        times += [phase.t, end]
        counts += [phase.conversations, phase.conversations]
    panel.plot(times, counts, color="black", label="wanted")
    seconds = [record for record in records if isinstance(record, Second)]
    panel.plot([each.t for each in seconds], [each.in_flight for each in seconds], alpha=0.6, label="in flight")
    failed = [record.t for record in records if isinstance(record, Failure)]
    panel.plot(failed, [0.0] * len(failed), "rx", label=f"failed ({len(failed)})")
    panel.legend(loc="upper left")


def _replicas(panel: Any, records: Sequence[Record]) -> None:
    by_service: dict[str, dict[float, float]] = {}
    for record in records:
        if isinstance(record, Replicas):
            by_time = by_service.setdefault(record.service, {})
            by_time[record.t] = by_time.get(record.t, 0.0) + record.ready
    for service, by_time in sorted(by_service.items()):
        panel.step(list(by_time), list(by_time.values()), where="post", label=service)
    if by_service:
        panel.legend(loc="upper left")


def _throughput(panel: Any, records: Sequence[Record]) -> None:
    seconds = [record for record in records if isinstance(record, Second)]
    panel.plot([each.t for each in seconds], [each.tokens for each in seconds])


def _first_token(panel: Any, records: Sequence[Record]) -> None:
    answers = [record for record in records if isinstance(record, Answer)]
    points = []
    for record in records:
        if isinstance(record, Second):
            recent = [
                answer.time_to_first_token_seconds
                for answer in answers
                if record.t - _WINDOW_SECONDS < answer.started + answer.time_to_first_token_seconds <= record.t
            ]
            points.append((record.t, percentile(recent, 0.95)))
    panel.plot([t for t, _ in points], [value for _, value in points])


if __name__ == "__main__":
    main()
