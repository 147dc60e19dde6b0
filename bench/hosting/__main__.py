"""The functions' own HTTP server beside others: `python -m bench.hosting`. Under four minutes.

Every server in a process of its own and in turn, some rounds, medians of them. Prints a table for docs/log.md; what a
client can do to these servers is not asked here, but there.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from statistics import median

import click

from bench.hosting.measure import Figures, measure
from bench.hosting.servers import SERVERS
from bench.report import machine
from knative.local.platform import ROOT

_START_SECONDS = 30.0


@contextmanager
def serving(name: str) -> Iterator[tuple[int, int]]:
    """Process id and port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.hosting.servers", name, str(port)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        _wait(port, time.monotonic() + _START_SECONDS)
        yield process.pid, port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(port: int, until: float) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def table(figures: Mapping[str, Sequence[Figures]]) -> str:
    names = list(figures)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for field in fields(Figures):
        cells = [f"{median(getattr(one, field.name) for one in figures[name]):.3g}" for name in names]
        lines.append(f"| {field.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def main(rounds: int) -> None:
    figures: dict[str, list[Figures]] = {name: [] for name in SERVERS}
    for number in range(rounds):
        for name in SERVERS:
            with serving(name) as (pid, port):
                figures[name].append(measure(pid, port))
            click.echo(f"round {number + 1} of {rounds}: {name}", err=True)
    click.echo(
        f"{machine()}, load {os.getloadavg()[0]:.1f}; {rounds} rounds; milliseconds, but requests_per_second and broken\n"
    )
    click.echo(table(figures))


if __name__ == "__main__":
    main()
