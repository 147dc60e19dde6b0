"""Nothing depends on how a library words its errors: wording changes in any release."""

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PRODUCT = ("storage", "eventing", "functions", "knative", "bench")
CARRIES_OUR_WORDS = {"openai"}  # its exceptions hold what Lamina's gateway answered


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def own_exceptions() -> set[str]:
    return {node.name for path in files(*PRODUCT, "tests") for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)}


def is_foreign(exception: str) -> bool:
    library, _, name = exception.rpartition(".")
    if library:
        return name not in own_exceptions() and library.split(".")[0] not in CARRIES_OUR_WORDS
    return name[:1].isupper() and name not in own_exceptions() and not hasattr(builtins, name)


def wording_decides(handler: ast.ExceptHandler) -> Iterator[ast.expr]:
    """Expressions that compare, search or split the text of the caught error."""

    def is_text(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return is_text(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr"):
            return any(isinstance(each, ast.Name) and each.id == handler.name for each in node.args)
        is_caught = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == handler.name
        return is_caught and node.attr in ("args", "msg", "message", "strerror")

    for node in ast.walk(handler):
        if isinstance(node, ast.Compare) and any(is_text(each) for each in (node.left, *node.comparators)):
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_search = isinstance(node.func.value, ast.Name) and node.func.value.id == "re" and any(map(is_text, node.args))
            if is_search or (is_text(node.func.value) and node.func.attr != "split"):  # split() and join make it one line
                yield node


@pytest.mark.slow
def test_no_decision_depends_on_wording() -> None:
    for path in files(*PRODUCT):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(is_foreign(ast.unparse(each)) for each in caught):
                    found = [f"line {each.lineno}: {ast.unparse(each)}" for each in wording_decides(node)]
                    assert not found, f"{path}: {found}"


@pytest.mark.slow
def test_no_test_pins_wording() -> None:
    for path in files("tests"):
        for node in ast.walk(tree(path)):
            matches = isinstance(node, ast.Call) and any(keyword.arg == "match" for keyword in node.keywords)
            if matches and ast.unparse(node.func) == "pytest.raises":
                expected = node.args[0].elts if isinstance(node.args[0], ast.Tuple) else [node.args[0]]
                foreign = [ast.unparse(each) for each in expected if is_foreign(ast.unparse(each))]
                assert not foreign, f"{path}, line {node.lineno}: match= pins the words of {foreign}"


def test_a_decision_by_wording_is_found() -> None:
    source = "try:\n    f()\nexcept lib.Error as e:\n    if 'busy' in str(e) or re.match('a', e.args[0]): g()"
    (handler,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    assert is_foreign("lib.Error")
    assert len(list(wording_decides(handler))) == 2
