"""Draws a run of `bench.serving`: tokens per second of all contenders, and where a decode step's time goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.serving.contenders import Results
from bench.serving.report import Findings
from bench.serving.round import RoundTime

_PARTS: Final = ("compute", "queue", "codec", "http", "gateway")


def draw(found: Findings, picture: Path) -> None:
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, workload in zip(panels.flat, found.results.workloads(), strict=False):
        _rates(panel, found.results, workload)
    _rounds(panels.flat[3], found.rounds)
    figure.savefig(picture, dpi=110)


def _rates(panel: Any, results: Results, workload: str) -> None:
    names = results.names(workload)[::-1]
    rates = [results.rate(workload, name) for name in names]
    colors = ["tab:blue" if name.startswith("Lamina") else "tab:gray" for name in names]
    panel.bar_label(panel.barh(names, rates, color=colors), fmt="%.0f", padding=2)
    panel.set_title(f"{workload}: tokens/s")
    panel.margins(x=0.12)


def _rounds(panel: Any, rounds: Mapping[str, RoundTime]) -> None:
    names = list(rounds)[::-1]
    left = [0.0] * len(names)
    for part in _PARTS:
        widths = [getattr(rounds[name], part) * 1000 for name in names]
        panel.barh(names, widths, left=left, label=part)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    panel.set_title("one round of a micro-batch, ms")
    panel.legend(fontsize="small")
