"""Draws a run of bench.coldstart: what a cold request waits for, and how the load phase shrinks with the cut."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.coldstart.report import Results, first_token
from bench.coldstart.runs import ColdStart

_COLOURS: Final = {"import": "#4477aa", "weights": "#66ccee", "place": "#228833", "gateway, first pass": "#bbbbbb"}


def draw(results: Results, picture: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _waits(left, results)
    _load_phases(right, results)
    figure.savefig(picture, dpi=120)


def _waits(panel: Any, results: Results) -> None:
    rate = f"{results.bytes_per_second / 1e6:.0f} MB/s a pod"
    runs = {
        "3 stages, cache": results.cached,
        "3 stages": results.stages,
        "monolith": results.monolith,
        f"3 stages, {rate}": results.limited[3],
        f"monolith, {rate}": results.monolith_limited,
    }
    for row, each in enumerate(runs.values()):
        middle = sorted(each, key=lambda run: run.first_token_seconds)[len(each) // 2]
        for part, (begin, end) in _parts(middle).items():
            panel.barh(row, end - begin, left=begin, color=_COLOURS[part], label=part if row == 0 else None)
        panel.text(middle.first_token_seconds, row, f" {middle.first_token_seconds:.2f} s", va="center")
    panel.set_yticks(range(len(runs)), list(runs))
    panel.set_xlabel("seconds from the client's request to its first token")
    panel.set_xlim(right=1.12 * max(first_token(each) for each in runs.values()))
    panel.legend(loc="lower right", title="of the latest stage")


def _parts(run: ColdStart) -> Mapping[str, tuple[float, float]]:
    """Begin and end, in the order of time. Weights that flow during the import cost nothing of their own."""
    ends = {phase: max(phases[phase] for phases in run.phases) for phase in run.phases[0]}
    imported = ends["import"]
    weights = max(imported, ends.get("last_byte", ends.get("download", 0.0)))
    placed = max(weights, ends.get("warm_up", ends.get("load", 0.0)))
    return {
        "import": (0.0, imported),
        "weights": (imported, weights),
        "place": (weights, placed),
        "gateway, first pass": (placed, run.first_token_seconds),
    }


def _load_phases(panel: Any, results: Results) -> None:
    stages = sorted(results.limited)
    panel.plot(stages, [results.wire_seconds(each) for each in stages], "k--", label="largest stage's bytes over the rate")
    panel.plot(stages, [results.load_phase(each) for each in stages], "o-", label="load phase")
    panel.plot(stages, [first_token(results.limited[each]) for each in stages], "s:", label="first token")
    panel.set_xticks(stages)
    panel.set_xlabel("stages")
    panel.set_ylabel("seconds")
    panel.set_ylim(bottom=0)
    panel.grid(visible=True, alpha=0.3)
    panel.legend()
