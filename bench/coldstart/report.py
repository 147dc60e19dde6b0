"""The results of a run of bench.coldstart: targets, tables and picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.figure import Figure

from bench.coldstart.runs import ColdStart
from bench.report import Verdict, judged, table, verdict_table

_COLOURS: Final = {"import": "#4477aa", "weights": "#66ccee", "place": "#228833", "gateway, first pass": "#bbbbbb"}


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
        phases = ", ".join(
            f"{phase} {end:.2f}" for phase, end in sorted(_ends(_middle(runs)).items(), key=lambda each: each[1])
        )
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


def _middle(runs: Sequence[ColdStart]) -> ColdStart:
    return sorted(runs, key=lambda run: run.first_token_seconds)[len(runs) // 2]


def _ends(run: ColdStart) -> dict[str, float]:
    """Phase → its end in the latest stage."""
    return {phase: max(phases[phase] for phases in run.phases) for phase in run.phases[0]}


def draw(results: Results, picture: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_waits(left, results)
    stages = sorted(results.limited)
    right.plot(stages, [results.wire_seconds(each) for each in stages], "k--", label="largest stage's bytes over the rate")
    right.plot(stages, [results.load_phase(each) for each in stages], "o-", label="load phase")
    right.plot(stages, [first_token(results.limited[each]) for each in stages], "s:", label="first token")
    right.set_xticks(stages)
    right.set_xlabel("stages")
    right.set_ylabel("seconds")
    right.set_ylim(bottom=0)
    right.grid(visible=True, alpha=0.3)
    right.legend()
    figure.savefig(picture, dpi=120)


def _draw_waits(panel: Any, results: Results) -> None:
    runs = {
        "3 stages, cache": results.cached,
        "3 stages": results.stages,
        f"3 stages, {results.rate}": results.limited[3],
    }
    for row, each in enumerate(runs.values()):
        run = _middle(each)
        ends = _ends(run)
        # Weights that flow during the import cost nothing extra.
        weights = max(ends["import"], ends["last_byte"])
        placed = max(weights, ends["warm_up"])
        begin = 0.0
        for part, end in zip(_COLOURS, (ends["import"], weights, placed, run.first_token_seconds), strict=True):
            panel.barh(row, end - begin, left=begin, color=_COLOURS[part], label=part if row == 0 else None)
            begin = end
        panel.text(run.first_token_seconds, row, f" {run.first_token_seconds:.2f} s", va="center")
    panel.set_yticks(range(len(runs)), list(runs))
    panel.set_xlabel("seconds from the client's request to its first token")
    panel.set_xlim(right=1.12 * max(first_token(each) for each in runs.values()))
    panel.legend(loc="lower right", title="of the latest stage")
