"""Reads the pages of the documentation (code, tables, headings), and the code that they are compared with."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "knative" / "local" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("storage", "eventing", "functions", "knative")

_SPAN = re.compile(r"`([^`\n]+)`")
_BRACES = re.compile(r"\{([^{}]*)\}")
_PROGRAM = re.compile(r"(?:make|python|\.venv/bin/python|pip|curl|kubectl|kn|podman|export) ")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def by_hand(page: Path) -> str:
    """The page without the sections that programs write."""
    return re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", "", page.read_text(), flags=re.DOTALL)


def spans(text: str) -> list[str]:
    """Code in backticks, outside of blocks."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in outside.splitlines() if not line.startswith("    ")]
    return _SPAN.findall("\n".join(lines))


def block_lines(text: str) -> list[str]:
    """Lines of code blocks. A line that ends with a backslash is joined with the next."""
    fenced = re.findall(r"^```.*?$(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [*fenced, *re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def code(text: str) -> list[str]:
    """Everything that is set as code: spans and lines of blocks."""
    return [*spans(text), *block_lines(text)]


def commands(page: Path) -> list[str]:
    """Shell commands in the blocks of a page, without the prompt and variables before them."""
    lines = (re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*", "", line) for line in block_lines(by_hand(page)))
    return [line for line in lines if _PROGRAM.match(line)]


def paths_of(pattern: str) -> list[Path]:
    """`a/{b,c}/d_*.py` → its files; empty as soon as a part of it matches nothing."""
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
    """The text from `## heading` to the next heading of that level."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def packages() -> set[str]:
    """Every folder of the product with an `__init__.py`, with a slash at its end."""
    return {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for folder in SOURCES for path in (ROOT / folder).rglob("__init__.py")
    }


@cache
def source_files() -> tuple[str, ...]:
    """Paths of all Python files, relative to the project's folder."""
    folders = (*SOURCES, "bench", "docs", "tests")
    return tuple(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def strings_of_the_code() -> tuple[str, ...]:
    """Every string of the product except docstrings; literal parts are joined, and `…` stands for a value."""
    return tuple(text for path in source_files() if path.startswith(SOURCES) for text in _strings(ROOT / path))


def _strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    ignored = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            yield node.value
