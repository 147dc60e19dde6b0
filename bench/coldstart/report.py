"""The results of a run of bench.coldstart: targets and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.coldstart.runs import ColdStart
from bench.report import Verdict, judged, table, verdict_table


@dataclass(frozen=True, slots=True)
class Results:
    """Each list has one entry per round."""

    bytes_per_second: float  # the limit of each pod in `limited`
    stages: list[ColdStart]  # three
    cached: list[ColdStart]  # three, with the folder of verified weights that `python -m knative run` has
    limited: Mapping[int, list[ColdStart]]  # by the number of stages

    @property
    def rate(self) -> str:
        return f"{self.bytes_per_second / 1e6:.0f} MB/s a pod"

    def load_phase(self, stages: int) -> float:
        """Seconds."""
        return median(each.load_seconds for each in self.limited[stages])

    def wire_seconds(self, stages: int) -> float:
        """The time that the largest stage's bytes take at the limit."""
        return self.limited[stages][0].largest_bytes / self.bytes_per_second


def first_token(runs: Sequence[ColdStart]) -> float:
    """Seconds, the median."""
    return median(each.first_token_seconds for each in runs)


def verdicts(results: Results) -> list[Verdict]:
    return [
        judged("first token of 3 stages", first_token(results.stages), 1.1, at_most=True, number="{:.2f} s"),
        *(
            judged(
                f"load phase of {stages} stage{'s' * (stages > 1)}, deviation from bytes over rate",
                abs(results.load_phase(stages) / results.wire_seconds(stages) - 1),
                0.25,
                at_most=True,
            )
            for stages in sorted(results.limited)
        ),
    ]


def markdown(results: Results) -> str:
    named = {
        f"3 stages, {results.rate}": results.limited[3],
        "3 stages": results.stages,
        "3 stages, weights out of the cache": results.cached,
    }
    tokens = []
    for name, runs in named.items():
        seconds = [each.first_token_seconds for each in runs]
        middle = sorted(runs, key=lambda run: run.first_token_seconds)[len(runs) // 2].phases
        ends = {phase: max(phases[phase] for phases in middle) for phase in middle[0]}
        phases = ", ".join(f"{phase} {end:.2f}" for phase, end in sorted(ends.items(), key=lambda each: each[1]))
        tokens.append((name, f"{first_token(runs):.2f}", f"{min(seconds):.2f} – {max(seconds):.2f}", phases))
    loads = []
    for stages, runs in sorted(results.limited.items()):
        wire, seen = results.wire_seconds(stages), results.load_phase(stages)
        largest = f"{runs[0].largest_bytes / 1e6:.0f}"
        loads.append((stages, largest, f"{wire:.2f}", f"{seen:.2f}", f"{seen / wire:.2f} ×", f"{first_token(runs):.2f}"))
    return "\n\n".join(
        [
            "### From a client's request to its first token, nothing running",
            table(("setting", "first token, seconds", "from – to", "ends of the phases, latest stage"), tokens),
            f"### The load phase, {results.rate}",
            table(("stages", "largest stage, MB", "over the rate, s", "load phase, s", "ratio", "first token, s"), loads),
            "### Targets",
            verdict_table(verdicts(results)),
        ]
    )
