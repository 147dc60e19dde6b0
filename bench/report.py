"""docs/benchmarks.md: each benchmark replaces its own section and leaves the others alone."""

import os
import platform
import re
from pathlib import Path
from typing import Final

_TITLE: Final = "# Benchmarks\n\nWritten by the programs in `bench/`; each section names its command, machine and settings.\n"


def write_section(document: Path, name: str, text: str) -> None:
    """Replaces section `name` of the document, which is created if it does not exist."""
    page = document.read_text(encoding="utf-8") if document.exists() else _TITLE
    document.write_text(with_section(page, name, text), encoding="utf-8")


def with_section(page: str, name: str, text: str) -> str:
    """The page with `text` between the comments that mark section `name`. A new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    after, replaced = pattern.subn(lambda _: section, page, count=1)
    return after if replaced else f"{page.rstrip()}\n\n{section}\n"


def machine() -> str:
    """The machine in a few words: processor, cores, memory, Python."""
    cores = len(os.sched_getaffinity(0))
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores} cores, {gibibytes:.0f} GiB, Python {platform.python_version()}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
