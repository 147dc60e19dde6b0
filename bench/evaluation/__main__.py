"""`make evaluate`: runs the experiments and writes their sections of docs/benchmarks.md.

    python -m bench.evaluation                               all, about an hour on two idle cores
    python -m bench.evaluation --quick                       small versions, some minutes: only shows that all of them run
    python -m bench.evaluation simulated faults              some of: emulated, calibration, simulated, opponents, faults,
                                                             measured, network
    python -m bench.evaluation emulated --seconds 120 --runs 2 --slowness 3
    python -m bench.evaluation --trace azure-2023.csv.gz     with the arrivals and sizes of a recorded trace

Each run's result is a file in the state folder, and a run with a result is not repeated: an interrupted evaluation resumes.
`--anew` deletes them first. A quick evaluation has a folder of its own and leaves the documentation alone.
"""

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import click
import msgspec

from bench.evaluation import experiments
from bench.evaluation import network as network_experiment
from bench.evaluation.emulated import measure_overheads
from bench.evaluation.experiments import NAMES, QUICK, Plan, Run
from bench.evaluation.network import Measured
from bench.evaluation.report import write_document
from bench.evaluation.results import Result, Results
from bench.evaluation.simulator import Overheads
from bench.evaluation.trace import LOADS, Bursts, TraceInvalid
from bench.report import ROOT, STATE, help_text
from knative.commands.options import STORE_FOLDER
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

_FILE: Final = click.Path(dir_okay=False, path_type=Path)


class Evaluation:
    """What the experiments share: results, and a store and overheads, which are made on first use."""

    def __init__(self, plan: Plan, state: Path, stack: ExitStack) -> None:
        self.results = Results(state / "results")
        self._plan, self._state, self._stack = plan, state, stack

    def runs(self, name: str) -> Iterator[Run]:
        plan = self._plan
        if name == "emulated":
            return experiments.emulated(plan, lambda: self.store, self._state / "logs")
        if name == "calibration":
            return experiments.calibration(plan, self.overheads)
        of_plan = (experiments.simulated, experiments.opponents, experiments.faults, experiments.measured)
        return dict(zip(NAMES[2:6], of_plan, strict=True))[name](plan)

    @cached_property
    def store(self) -> ObjectStore:
        embedded = self._stack.enter_context(EmbeddedStore(STATE / "load" / STORE_FOLDER))
        return ObjectStore(embedded.settings)

    @cached_property
    def overheads(self) -> Overheads:
        """Measured once and stored with the results."""
        path = self._state / "overheads.yaml"
        if path.exists():
            return msgspec.yaml.decode(path.read_bytes(), type=Overheads)
        setting = experiments.setting_13b(slowness=self._plan.slowness)
        found = measure_overheads(setting, self.store, self._state / "logs" / "overheads")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.yaml.encode(asdict(found)))
        return found


def _followed(name: str, runs: Sequence[Run], results: Results, say: Callable[[str], None]) -> list[Result]:
    """All results in order; reports each with a line."""
    found, began, fresh = [], time.monotonic(), 0
    for number, run in enumerate(runs, start=1):
        there = results.read(run.key) is not None
        result = results.of(run.key, run.action)
        fresh += not there
        found.append(result)
        took = "on disk" if there else f"{result.wall_seconds or 0:.1f} s"
        left = (time.monotonic() - began) / fresh * (len(runs) - number) if fresh else 0.0
        outcome = result.outcome
        say(
            f"{name} {number}/{len(runs)}: {run.key.load}, {run.key.way}, run {run.key.seed}: {outcome.tokens_per_second:.0f} "
            f"tokens/s, {outcome.attainment:.0%} within the objective; {took}, some {left / 60:.0f} min to go"
        )
    return found


def _networks(plan: Plan, state: Path, evaluation: Evaluation, say: Callable[[str], None]) -> tuple[str, str]:
    """The table and the verdict. Each network and remedy has a file, like other results."""
    found: list[Measured] = []
    for network, remedies in plan.networks.items():
        for what in ("no remedy", *remedies):
            remedy = network_experiment.REMEDIES.get(what, network_experiment.NOTHING)
            name = network_experiment.file_name(network, remedy, plan.network_lengths)
            path = state / "results" / name
            if not path.exists():
                logs = state / "logs" / name.removesuffix(".yaml")
                measured = network_experiment.measure(network, remedy, plan.network_lengths, evaluation.store, logs)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(msgspec.yaml.encode(measured))
            measured = msgspec.yaml.decode(path.read_bytes(), type=list[Measured])
            said = ", ".join(f"{each.tokens_per_second:.1f} tokens/s {each.at_once} at a time" for each in measured)
            rate = network.bytes_per_second or "any"
            say(f"network: {network.delay_seconds * 1e3:g} ms, {rate} bytes/s, {what}: {said}")
            found += measured
    return network_experiment.network_table(network_experiment.stage_plans(evaluation.store), found)


@click.command(help=help_text(__doc__))
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Small versions.")
@click.option("--trace", type=_FILE, help="TIMESTAMP,ContextTokens,GeneratedTokens.")
@click.option("--load", "loads", type=click.Choice(LOADS), multiple=True, help="Default: those of each experiment.")
@click.option("--seconds", type=click.IntRange(min=1), help="Of a load; default: 240, simulated 600.")
@click.option(
    "--bursts", type=(click.IntRange(min=1), click.IntRange(min=0)), help="Seconds of a burst and of a pause; default: 24 36."
)
@click.option("--runs", type=click.IntRange(min=1), help="Runs of each way, with different seeds; default: 4.")
@click.option("--peak", type=float, help="Requests a second in a burst; default: 4.")
@click.option("--slowness", type=float, help="Of emulated devices: a busy machine then adds little to a pass. Default: 1.")
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), default=STATE / "evaluation")
@click.option("--document", type=_FILE, help="To write into; default: docs/benchmarks.md, for a quick evaluation none.")
@click.option("--anew", is_flag=True, help="Delete earlier results first.")
def main(
    names: Sequence[str],
    quick: bool,
    trace: Path | None,
    loads: Sequence[str],
    seconds: int | None,
    bursts: tuple[int, int] | None,
    runs: int | None,
    peak: float | None,
    slowness: float | None,
    state: Path,
    document: Path | None,
    anew: bool,
) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    base = QUICK if quick else Plan()
    plan = replace(
        base,
        trace=trace,
        emulated_seconds=seconds or base.emulated_seconds,
        bursts=base.bursts if bursts is None else Bursts(*bursts),
        simulated_seconds=seconds or base.simulated_seconds,
        emulated_loads=loads or base.emulated_loads,
        simulated_loads=loads or base.simulated_loads,
        measured_loads=loads or base.measured_loads,
        runs=runs or base.runs,
        simulated_runs=runs or base.simulated_runs,
        measured_runs=runs or base.measured_runs,
        peak=peak or base.peak,
        slowness=slowness or base.slowness,
    )
    state = state / ("quick" if quick else "full")
    if anew:
        shutil.rmtree(state, ignore_errors=True)
    document = document or (None if quick else ROOT / "docs" / "benchmarks.md")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a run ends its processes then
    with ExitStack() as stack:
        evaluation = Evaluation(plan, state, stack)
        found: dict[str, list[Result]] = {}
        networks: tuple[str, str] | None = None
        try:
            for name in names or NAMES:
                if name == "network":
                    networks = _networks(plan, state, evaluation, click.echo)
                    continue
                found[name] = _followed(name, list(evaluation.runs(name)), evaluation.results, click.echo)
        except TraceInvalid as error:
            raise click.ClickException(str(error)) from error
        if "calibration" in found and "emulated" not in found:
            found["emulated"] = [
                result for run in evaluation.runs("emulated") if (result := evaluation.results.read(run.key)) is not None
            ]
        overheads = evaluation.overheads if "calibration" in found else None
    numbers = {"seconds": seconds, "runs": runs, "peak": peak, "slowness": slowness}
    options = [f"--{name} {number:g}" for name, number in numbers.items() if number is not None]
    options += ["--quick"] * quick + [f"--load {load}" for load in loads]
    options += [] if bursts is None else ["--bursts {} {}".format(*bursts)]
    options += [] if trace is None else [f"--trace {trace.name}"]
    command = " ".join(["python -m bench.evaluation", *names, *options])
    pages = write_document(document, found, overheads, command, time.monotonic() - began, networks)
    if document is None:
        click.echo("\n\n".join(pages.values()))


if __name__ == "__main__":
    main()
