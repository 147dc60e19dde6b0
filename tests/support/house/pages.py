"""What the pages of the documentation name, in backticks, blocks and tables; and what the code says, to hold them to."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("storage", "eventing", "functions", "knative")

_SPAN = re.compile(r"`([^`\n]+)`")
_BRACES = re.compile(r"\{([^{}]*)\}")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def spans(text: str) -> list[str]:
    """Code in backticks, without what stands in blocks."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in outside.splitlines() if not line.startswith("    ")]
    return _SPAN.findall("\n".join(lines))


def code(text: str) -> list[str]:
    """Everything that is set as code: spans, and the lines of blocks, a line that ends with a backslash with the next."""
    fenced = re.findall(r"^```.*?$(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [*fenced, *re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    return [*spans(text), *(line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())]


def paths_of(pattern: str) -> list[Path]:
    """`a/{b,c}/d_*.py` → what there is of it; empty as soon as a part of it finds nothing."""
    found: list[Path] = []
    for each in _expanded(pattern):
        matches = list(ROOT.glob(each.rstrip("/")))
        if not matches or (each.endswith("/") and not all(match.is_dir() for match in matches)):
            return []
        found += matches
    return found


def _expanded(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for choice in braces[1].split(","):
        yield from _expanded(pattern[: braces.start()] + choice.strip() + pattern[braces.end() :])


def tables(text: str) -> list[list[list[str]]]:
    """The body rows of each table, as cells."""
    found = re.findall(r"^\|.*\|\n\|[-| :]+\|\n((?:\|.*\|\n?)*)", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()] for body in found]


def section(text: str, heading: str) -> str:
    """From `## heading` to the next heading of that rank."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rooms() -> set[str]:
    """Every folder of the product with an `__init__.py`, with a slash at its end."""
    return {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for folder in SOURCES for path in (ROOT / folder).rglob("__init__.py")
    }


@cache
def source_files() -> tuple[str, ...]:
    """Paths of all Python files, from the project's folder."""
    folders = (*SOURCES, "bench", "docs", "tests")
    return tuple(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def strings_of_the_code() -> tuple[str, ...]:
    """Every string of the product but docstrings, pieces put together, `…` in place of what is filled in."""
    return tuple(text for path in source_files() if path.startswith(SOURCES) for text in _strings(ROOT / path))


def _strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    ignored = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            yield node.value
