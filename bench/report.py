"""What benchmarks report with: verdicts, Markdown tables, and their sections of docs/benchmarks.md.

A section is the text between the comments `<!-- begin name -->` and `<!-- end name -->`. A benchmark replaces its own.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, Final, NoReturn

import click

ROOT: Final = Path(__file__).resolve().parents[1]
STATE: Final = ROOT / ".lamina"
DOCUMENT: Final = ROOT / "docs" / "benchmarks.md"
_TITLE: Final = "# Benchmarks\n\nWritten by the programs in `bench/`; each section names its command, machine and settings.\n"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target of a benchmark, and whether the run met it."""

    what: str
    seen: str
    met: bool | None  # None: not measurable in this run
    wanted: str = ""

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measurable"}[self.met]

    def __str__(self) -> str:
        return f"{self.word}: {self.what}: {self.seen}" + (f", wanted {self.wanted}" if self.wanted else "")


def judged(what: str, seen: float | None, wanted: float, *, at_most: bool = False, number: str = "{:.2f}") -> Verdict:
    """A number against its bound. number: how both are written. seen: None if it was not measured."""
    bound = f"{'≤' if at_most else '≥'} {number.format(wanted)}"
    if seen is None:
        return Verdict(what, "–", None, bound)
    return Verdict(what, number.format(seen), seen <= wanted if at_most else seen >= wanted, bound)


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    return table(["target", "wanted", "seen", ""], ([each.what, each.wanted, each.seen, each.word] for each in verdicts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. All columns but the first are aligned right."""
    lines: list[Sequence[object]] = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def milliseconds(seconds: float, digits: int = 1) -> str:
    return f"{seconds * 1000:.{digits}f}"


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def command_line(module: str) -> str:
    """The command of this run, as Markdown."""
    return f"`{' '.join([f'python -m {module}', *sys.argv[1:]])}`"


def help_text(doc: str | None) -> str:
    """A module's docstring for `--help`, where click does not wrap the indented examples."""
    return re.sub(r"\n\n(?= )", "\n\n\b\n", doc or "")


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --output, the document to write the section into."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option("--output", type=path, default=DOCUMENT)(command)


def write_section(document: Path, name: str, text: str) -> None:
    """Replaces section `name` of the document, which is created with its folder if it does not exist."""
    page = document.read_text(encoding="utf-8") if document.exists() else _TITLE
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(with_section(page, name, text), encoding="utf-8")


def report(output: Path, name: str, text: str, verdicts: Iterable[Verdict]) -> None:
    """Writes a section into the document, and prints the verdicts."""
    write_section(output, name, text)
    for verdict in verdicts:
        click.echo(verdict)
    click.echo(f"{output} has the rest")


def conclude(name: str, text: str, verdicts: Iterable[Verdict], *, write: bool) -> NoReturn:
    """Prints a section, writes it into docs/benchmarks.md, and ends the process: with status 1 if a target is missed."""
    click.echo(text)
    if write:
        write_section(DOCUMENT, name, text)
    sys.exit(0 if all(verdict.met for verdict in verdicts) else 1)


def with_section(page: str, name: str, text: str) -> str:
    """The page with `text` between the comments that mark section `name`. A new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    after, replaced = pattern.subn(lambda _: section, page, count=1)
    return after if replaced else f"{page.rstrip()}\n\n{section}\n"


def machine() -> str:
    """The machine in a few words: processor, cores, memory, Python."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    processor = found[1].strip() if found else platform.machine()
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, {gibibytes:.0f} GiB, Python {platform.python_version()}"
