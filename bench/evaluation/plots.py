"""The figures of docs/benchmarks.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

from bench.evaluation.outcome import Outcome
from bench.evaluation.results import Result, interval
from bench.evaluation.setting import WAYS

_PANELS: Final[tuple[tuple[str, Callable[[Outcome], float]], ...]] = (
    ("first token p95, s", lambda o: o.first_token_seconds[1]),
    ("within the objective, %", lambda o: o.attainment * 100),
    ("replica-seconds", lambda o: o.cost.replica_seconds),
)


def draw_ways(results: Sequence[Result], loads: Sequence[str], path: Path) -> None:
    """A panel for each measure, a group of bars for each load."""
    figure, panels = _figure(len(_PANELS))
    width = 0.8 / len(WAYS)
    for panel, (title, read) in zip(panels, _PANELS, strict=True):
        for number, way in enumerate(WAYS):
            mine = [[each.outcome for each in results if (each.key.load, each.key.way) == (load, way)] for load in loads]
            found = [interval(map(read, outcomes)) for outcomes in mine]
            places = [index + (number - 2) * width for index in range(len(loads))]
            halves = [0.0 if half != half else half for _, half in found]
            panel.bar(places, [mean for mean, _ in found], width, yerr=halves, label=way, capsize=2)
        panel.set_xticks(range(len(loads)), loads)
        panel.set_title(title)
    panels[0].set_yscale("log")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="lower center", ncols=len(WAYS))
    _save(figure, path, below=0.08)


def draw_scale(results: Sequence[Result], path: Path) -> None:
    """Against the number of stages, a line for each model."""
    figure, panels = _figure(len(_PANELS))
    for panel, (title, read) in zip(panels, _PANELS, strict=True):
        for model in dict.fromkeys(each.key.load.split(",")[0] for each in results):
            by_stages: dict[int, list[float]] = {}
            for each in results:
                name, _, cut = each.key.load.partition(", ")
                if name == model and each.outcome.requests:
                    by_stages.setdefault(int(cut.split()[0]), []).append(read(each.outcome))
            found = {stages: interval(values)[0] for stages, values in sorted(by_stages.items())}
            panel.plot(list(found), list(found.values()), "o-", label=model)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("stages")
        panel.set_title(title)
    panels[0].legend()
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(5 * panels, 4))


def _save(figure: Any, path: Path, below: float = 0.0) -> None:
    """below: share of the height that is kept for a legend."""
    from matplotlib import pyplot

    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
