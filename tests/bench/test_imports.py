"""Modules of bench import each other without a circle, also inside functions and for types alone."""

from graphlib import TopologicalSorter

from tests.support.house.imports import file_of, imports
from tests.support.paths import ROOT


def test_bench_has_no_import_circle() -> None:
    paths = [*(ROOT / "bench").rglob("*.py")]
    graph = {path: {file_of(name) for name in imports(path)} & {*paths} - {path} for path in paths}
    assert ROOT / "bench" / "report.py" in graph[ROOT / "bench" / "many" / "__main__.py"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
