"""Draws a run of `bench.serving`: tokens per second of all contenders, and where a decode step's time goes."""

from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from bench.serving.report import Findings

_PARTS: Final = ("compute", "queue", "codec", "http", "gateway")


def draw(found: Findings, picture: Path) -> None:
    figure = Figure(figsize=(13, 9), layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    for panel, workload in zip(panels, found.results.workloads(), strict=False):
        names = found.results.names(workload)[::-1]
        rates = [found.results.rate(workload, name) for name in names]
        colors = ["tab:blue" if name.startswith("Lamina") else "tab:gray" for name in names]
        panel.bar_label(panel.barh(names, rates, color=colors), fmt="%.0f", padding=2)
        panel.set_title(f"{workload}: tokens/s")
        panel.margins(x=0.12)
    names = list(found.rounds)[::-1]
    left = [0.0] * len(names)
    for part in _PARTS:
        widths = [getattr(found.rounds[name], part) * 1000 for name in names]
        last.barh(names, widths, left=left, label=part)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    last.set_title("one round of a micro-batch, ms")
    last.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
