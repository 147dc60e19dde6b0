"""What a run of bench.coldstart has measured, whether it is what must show, and how it is told."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bench.coldstart.contenders import Loaded
from bench.coldstart.runs import ColdStart

LABELS: Final = {
    "lamina": "Lamina: verified, into tensors",
    "lamina_cached": "Lamina: out of the local cache, verified",
    "plain_gets": "plain ranged GETs into a buffer that is thrown away",
    "plain_gets_small_buffer": "plain ranged GETs, over and over into 1 MiB: no memory at all",
    "boto3_download": "boto3 `download_file`, then load",
    "runai_streamer": "runai-model-streamer",
}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything in seconds, each list one entry per round."""

    loading: Mapping[str, Sequence[Loaded]]
    loading_bytes: int
    bytes_per_second: float
    """The limit of each pod."""
    monolith: Sequence[ColdStart]
    monolith_limited: Sequence[ColdStart]
    stages: Sequence[ColdStart]
    """Three."""
    cached: Sequence[ColdStart]
    """With the folder of verified weights that `python -m knative run` has."""
    limited: Mapping[int, Sequence[ColdStart]]
    """By the number of stages."""
    imports: Mapping[str, Sequence[float]]

    def loading_seconds(self, name: str) -> float:
        return median(each.seconds for each in self.loading[name])

    def load_phase(self, stages: int) -> float:
        return median(each.load_seconds for each in self.limited[stages])

    def wire_seconds(self, stages: int) -> float:
        """What the largest stage's bytes take at the limit."""
        return self.limited[stages][0].largest_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    seen: float
    bound: float
    at_least: bool = False
    unit: str = " ×"

    @property
    def holds(self) -> bool:
        return self.seen >= self.bound if self.at_least else self.seen <= self.bound


def first_token(runs: Sequence[ColdStart]) -> float:
    return median(each.first_token_seconds for each in runs)


def verdicts(results: Results) -> Iterator[Verdict]:
    ours = results.loading_seconds("lamina")
    for name in ("boto3_download", "runai_streamer"):
        yield Verdict(f"loading, against {LABELS[name]}", results.loading_seconds(name) / ours, 2.0, at_least=True)
    yield Verdict(f"loading, against {LABELS['plain_gets']}", results.loading_seconds("plain_gets") / ours, 0.9, at_least=True)
    yield Verdict("loading out of the cache, against the store", ours / results.loading_seconds("lamina_cached"), 5.0, True)
    yield Verdict("first token of 3 stages", first_token(results.stages), 1.1, unit=" s")
    share = first_token(results.limited[3]) / first_token(results.monolith_limited)
    yield Verdict("first token of 3 stages against the monolith, limited", share, 0.3)
    yield Verdict("the same without a limit", first_token(results.stages) / first_token(results.monolith), 0.7)
    for stages in sorted(results.limited):
        off = abs(results.load_phase(stages) / results.wire_seconds(stages) - 1)
        yield Verdict(f"load phase of {stages} stage{'s' * (stages > 1)}, off bytes over rate by", off, 0.25, unit="")
    imports = {name: median(seconds) for name, seconds in results.imports.items()}
    yield Verdict("import of a native stage, against torch alone", imports["native stage"] / imports["import torch"], 0.35)
    yield Verdict("import of the gateway", imports["gateway"], 0.5, unit=" s")


def markdown(results: Results) -> str:
    sections = (_loading(results), _first_tokens(results), _load_phases(results), _imports(results), _verdicts(results))
    return "\n\n".join(sections)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(results: Results) -> str:
    ours = results.loading_seconds("lamina")
    rows = []
    for name, runs in results.loading.items():
        seconds, cpu = results.loading_seconds(name), median(each.cpu_seconds for each in runs)
        speed = f"{results.loading_bytes / seconds / 1e9:.2f}"
        rows.append((LABELS[name], f"{seconds:.2f}", speed, f"{cpu:.2f}", f"{seconds / ours:.2f} ×"))
    title = f"### Store → tensors, one stage of {results.loading_bytes / 2**20:.0f} MiB over loopback"
    columns = ("way", "seconds", "GB/s", "CPU seconds of the reader", "its time to Lamina's")
    return f"{title}\n\n{table(columns, rows)}"


def _first_tokens(results: Results) -> str:
    limit = f"{results.bytes_per_second / 1e6:.0f} MB/s a pod"
    named = {
        f"monolith, {limit}": results.monolith_limited,
        f"3 stages, {limit}": results.limited[3],
        "monolith": results.monolith,
        "3 stages": results.stages,
        "3 stages, weights out of the cache": results.cached,
    }
    rows = [(name, f"{first_token(runs):.2f}", _spread(runs), _phases(runs)) for name, runs in named.items()]
    columns = ("what", "first token, seconds", "from – to", "ends of the phases, latest stage")
    return f"### From a client's request to its first token, nothing running\n\n{table(columns, rows)}"


def _spread(runs: Sequence[ColdStart]) -> str:
    seconds = [each.first_token_seconds for each in runs]
    return f"{min(seconds):.2f} – {max(seconds):.2f}"


def _phases(runs: Sequence[ColdStart]) -> str:
    """Of the run in the middle."""
    run = sorted(runs, key=lambda each: each.first_token_seconds)[len(runs) // 2]
    ends = {phase: max(phases[phase] for phases in run.phases) for phase in run.phases[0]}
    return ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in sorted(ends.items(), key=lambda item: item[1]))


def _load_phases(results: Results) -> str:
    rows = []
    for stages in sorted(results.limited):
        largest, wire, seen = results.limited[stages][0].largest_bytes, results.wire_seconds(stages), results.load_phase(stages)
        total = first_token(results.limited[stages])
        rows.append((str(stages), f"{largest / 1e6:.0f}", f"{wire:.2f}", f"{seen:.2f}", f"{seen / wire:.2f} ×", f"{total:.2f}"))
    title = f"### The load phase, {results.bytes_per_second / 1e6:.0f} MB/s a pod"
    columns = ("stages", "largest stage, MB", "over the rate, s", "load phase, s", "of it", "first token, s")
    return f"{title}\n\n{table(columns, rows)}"


def _imports(results: Results) -> str:
    torch = median(results.imports["import torch"])
    rows = [(name, f"{median(each):.2f}", f"{median(each) / torch:.2f} ×") for name, each in results.imports.items()]
    return f"### Imports, whole processes\n\n{table(('process', 'seconds', 'of torch alone'), rows)}"


def _verdicts(results: Results) -> str:
    rows = []
    for verdict in verdicts(results):
        bound = f"{'≥' if verdict.at_least else '≤'} {verdict.bound:g}{verdict.unit}"
        rows.append((verdict.what, f"{verdict.seen:.2f}{verdict.unit}", bound, "yes" if verdict.holds else "**no**"))
    return f"### What must show\n\n{table(('what', 'seen', 'bound', 'holds'), rows)}"
