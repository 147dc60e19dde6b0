"""Reads the import statements of files of this repository."""

import ast
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def imports(path: Path, *, in_functions: bool = True, for_types: bool = True) -> frozenset[str]:
    """Dotted names that the file imports; `from package import name` is `package.name`.

    in_functions: with those that run only when a function is called. for_types: with those under `if TYPE_CHECKING`.
    Raises ValueError for a relative import.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: relative import; write the whole name")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            todo += node.orelse
        elif in_functions or not isinstance(node, _FUNCTIONS):
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def file_of(name: str) -> Path | None:
    """The module that an imported name is, or comes from. None: no file here, or a package's `__init__.py`."""
    for module in (name, name.rpartition(".")[0]):
        path = ROOT / (module.replace(".", "/") + ".py")
        if path.is_file():
            return path
    return None


def files_reached(start: Path, *, in_functions: bool = True) -> frozenset[Path]:
    """`start` and the files of this repository that it imports, directly or through others; none for types alone."""
    reached: set[Path] = set()
    todo: list[Path | None] = [start]
    while todo:
        path = todo.pop()
        if path is not None and path not in reached:
            reached.add(path)
            todo += map(file_of, imports(path, in_functions=in_functions, for_types=False))
    return frozenset(reached)
