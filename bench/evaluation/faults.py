"""Faults under bursts: a pod is killed every 20 s, and one pod runs at a third of its speed. How long do answers pause?

    python -m bench.evaluation.faults                        a pipeline that scales, two minutes
    python -m bench.evaluation.faults "static pipeline"      another way of bench/evaluation
    python -m bench.evaluation.faults --no-slow --no-kill    the same without faults

It prints a row of a table: tokens' p50, p99 and p99.9, the longest pause between two tokens of an answer, answers that ended
with an error (lost), and those that had not ended 30 s after the last arrival.
"""

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
import numpy as np

from bench.evaluation.emulated import EmulatedRun
from bench.evaluation.experiments import Plan, setting_13b
from bench.evaluation.setting import OBJECTIVE, WAYS
from bench.evaluation.trace import make_loads
from bench.report import STATE, help_text
from knative.commands.options import STORE_FOLDER
from knative.local.kubelet.pods import LocalPod
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

_KILL_SECONDS: Final = 20.0
# A quota of processor time looks like this to a process: it runs a third of the time, and pauses are as long as two passes.
_RUNS_SECONDS: Final = 0.02
_STOPS_SECONDS: Final = 0.04
_Pods = Callable[[], list[list[LocalPod]]]


@dataclass(slots=True)
class Faults:
    """Kills and slows pods of stages, chosen by a seed."""

    dice: random.Random
    slow: bool = True
    kill: bool = True
    killed: list[str] = field(default_factory=list)

    async def __call__(self, pods: _Pods) -> None:
        """Runs until it is cancelled."""
        await asyncio.gather(*([self._slow(pods)] if self.slow else []), *([self._kill(pods)] if self.kill else []))

    async def _kill(self, pods: _Pods) -> None:
        while True:
            await asyncio.sleep(_KILL_SECONDS)
            ready = [pod for stage in pods() for pod in stage if pod.ready and pod.pid is not None]
            if ready:
                pod = self.dice.choice(ready)
                self.killed.append(pod.name)
                _send(pod, signal.SIGKILL)

    async def _slow(self, pods: _Pods) -> None:
        """Stops and continues the first pod of the second stage, or the one that takes its place."""
        while True:
            slowed = next((pod for pod in pods()[-1 if len(pods()) == 1 else 1] if pod.ready and pod.pid is not None), None)
            try:
                if slowed is not None:
                    _send(slowed, signal.SIGSTOP)
                await asyncio.sleep(_STOPS_SECONDS)
            finally:
                if slowed is not None:
                    _send(slowed, signal.SIGCONT)
            await asyncio.sleep(_RUNS_SECONDS)


def _send(pod: LocalPod, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        if pod.pid is not None:
            os.kill(pod.pid, number)


@click.command(help=help_text(__doc__))
@click.argument("way", type=click.Choice(WAYS), default=OBJECTIVE)
@click.option("--seconds", type=click.IntRange(min=10), default=120, show_default=True, help="Of bursts.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--slow/--no-slow", default=True, help="One pod at a third of its speed.")
@click.option("--kill/--no-kill", default=True, help="One pod killed every 20 s.")
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), default=STATE / "evaluation" / "faults")
def main(way: str, seconds: int, seed: int, slow: bool, kill: bool, state: Path) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    plan = Plan()
    trace = make_loads(seconds, plan.peak, seed, None, plan.bursts)["bursts"].with_answers_within(plan.answer_tokens)
    faults = Faults(random.Random(seed), slow, kill)
    with EmbeddedStore(STATE / "load" / STORE_FOLDER) as embedded:
        store = ObjectStore(embedded.settings)
        run = EmulatedRun(setting_13b(), way, trace, store, state / f"{way}-{seed}", plan.tail_seconds, faults)
        outcome = asyncio.run(run.run())
    p50, p99, most = np.quantile(run.gaps, (0.5, 0.99, 0.999))
    names = (
        "way",
        "killed",
        "answers",
        "a token p50",
        "p99",
        "p99.9",
        "longest pause",
        "lost",
        "unfinished",
        "first token p95",
    )
    seconds_of = [f"{value:.2f} s" for value in (p50, p99, most, run.gaps.max())]
    counts = [str(run.errors), str(outcome.failed - run.errors)]
    first = f"{outcome.first_token_seconds[1]:.2f} s"
    row = [f"{way}{', one slow' if slow else ''}", str(len(faults.killed)), str(outcome.requests), *seconds_of, *counts, first]
    for cells in (names, ["---"] * len(names), row):
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
