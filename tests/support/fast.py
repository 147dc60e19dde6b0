"""Which test files `make test-fast` leaves out because they need torch, decided by reading imports."""

import ast
from functools import cache
from pathlib import Path

from tests.support.house.without import HEAVY
from tests.support.paths import ROOT


def needs_torch(path: Path) -> bool:
    """Whether importing `path` imports torch, itself or through other files of this repository."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for module in _imported(current):
            if module.split(".")[0] in HEAVY:
                return True
            source = ROOT / (module.replace(".", "/") + ".py")
            if source.is_file():
                todo.append(source)
    return False


@cache
def _imported(path: Path) -> frozenset[str]:
    """Modules imported when `path` is imported: not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
    return frozenset(found)
