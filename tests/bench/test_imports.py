"""Modules of bench import each other without a circle, also inside functions and for types alone."""

import ast
from graphlib import TopologicalSorter

from tests.support.paths import ROOT


def test_bench_has_no_import_circle() -> None:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "bench").rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[module] = (named & paths.keys()) - {module}
    assert "bench.report" in graph["bench.kv.__main__"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
