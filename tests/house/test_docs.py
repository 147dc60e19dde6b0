"""Pages say what is so: links lead somewhere, shown output is what commands print, messages are those of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN_BY_BENCHMARKS = ("benchmarks.md", "docs/benchmarks.md")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link or path in WRITTEN_BY_BENCHMARKS:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index]


def test_the_plan_that_is_shown_is_the_one_that_is_printed() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    command, shown = re.findall(r"(?:^    .+\n)+", page, re.MULTILINE)[:2]
    arguments = command.split()[1:]
    printed = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in printed.splitlines()]


def test_messages_that_are_explained_are_the_codes_own() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    table = page.partition("## When it does not work")[2]
    code = "".join(path.read_text() for path in (ROOT / "knative").rglob("*.py"))
    known = {"does not serve Service (serving.knative.dev/v1)": "does not serve {kind} ({api_version})"}
    known |= {
        "does not serve PodMonitor": "does not serve {kind}",
        "not ready after 900 s": "not ready after {self._timeout_seconds:g} s",
    }
    known |= {"its finalizers: …": "its finalizers: "}
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 8
    assert not [message for message in messages if known.get(message, message) not in code]


def test_settings_that_are_named_exist() -> None:
    """In backticks, as `section.field`."""
    from knative.spec.pipeline_spec import PipelineSpec

    text = "".join((ROOT / "docs" / name).read_text() for name in ("deploying.md", "sizing.md", "security.md", "operating.md"))
    fields = (ROOT / "knative" / "spec" / "pipeline_spec.py").read_text()
    for section, name in re.findall(r"`(stage|gateway|store|network|model|monitoring)\.(?:\w+\.)?(\w+)", text):
        assert section in PipelineSpec.__struct_fields__
        assert re.search(rf"^    {name}: ", fields, re.MULTILINE), f"{section}.{name}"
