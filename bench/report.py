"""docs/benchmarks.md: each benchmark replaces its own section and leaves the others alone."""

import os
import platform
import re
from pathlib import Path
from typing import Final

_TITLE: Final = "# Benchmarks\n\nWritten by the programs in `bench/`; each section names its command, machine and settings.\n"


def write_section(document: Path, name: str, text: str) -> None:
    """Puts `text` between the comments that mark section `name`; a new section goes to the end. Creates the document."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    before = document.read_text(encoding="utf-8") if document.exists() else _TITLE
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    after, replaced = pattern.subn(lambda _: section, before, count=1)
    document.write_text(after if replaced else f"{before.rstrip()}\n\n{section}\n", encoding="utf-8")


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
