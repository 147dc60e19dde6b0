"""Pages are true: links lead somewhere, named files and commands exist, quoted messages are the code's own."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from knative.__main__ import main as command_line
from tests.support.house.pages import (
    PAGES,
    anchors,
    by_hand,
    code,
    commands,
    packages,
    paths_of,
    section,
    source_files,
    spans,
    strings_of_the_code,
    tables,
)
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
FOLDERS = ("bench", "docs", "eventing", "examples", "functions", "knative", "monitoring", "storage", "tests")
MODULES = ("bench", "eventing", "functions", "knative", "storage", "tests")
MOST_PAGES = 13

PYTHON = ".venv/bin/python"  # the one that `make setup` fills; another `python` lacks the packages
# How a command of a page begins, and the test that runs it. Targets of make and `python -m knative` are tested below.
RUN_BY = {
    "curl http://127.0.0.1:8080/": "tests/pipeline/test_page_commands.py",
    "curl -N http://127.0.0.1:8080/": "tests/pipeline/test_page_commands.py",
    "curl -i ": "tests/pipeline/test_eventing_jobs.py",  # the same events, to a Broker on one machine
    f"{PYTHON} -m knative.local ": "tests/knative/local/test_alone.py",
    f"{PYTHON} -m pytest ": "tests/functions/gateway/stages/test_routes.py",
    "export ": "tests/house/test_makefile.py",
}
NEEDS_A_CLUSTER = ("kubectl ", "kn ", "podman push ", "curl $BROKER ", "curl -s http://127.0.0.1:9464/")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_the_readme_links_every_page() -> None:
    pages = [page.name for page in DOCS.glob("*.md")]
    readme = (ROOT / "README.md").read_text()
    assert len(pages) <= MOST_PAGES
    assert not [name for name in pages if f"](docs/{name})" not in readme]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_pages_that_code_names_exist() -> None:
    files = [
        ROOT / "Makefile",
        *(path for folder in FOLDERS for end in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{end}")),
    ]
    named = {(path, found) for path in files for found in re.findall(r"\bdocs/(\w[\w-]*\.md)(?:#([\w-]+))?", path.read_text())}
    assert len(named) > 20
    for path, (page, anchor) in named:
        assert (DOCS / page).exists(), f"{path} names docs/{page}"
        assert not anchor or anchor in anchors(DOCS / page), f"{path} names docs/{page}#{anchor}"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    """A page names a file by its path, a pattern, or an end of its path that is unique (in a package that the page names)."""
    named = spans(page.read_text())
    here = tuple(package for package in packages() if {package, package.rstrip("/")} & set(named))
    for span in named:
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*{{}}, -]*|(?!__)[\w/*]+\.py", span):
            ends = [path for path in source_files() if fnmatch(path, f"*/{span}")]
            clear = len(ends) == 1 or "*" in span or any(path.startswith(here) for path in ends)
            assert paths_of(span) or (ends and clear), f"{page.name} names {span}, which may be {ends}"


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def source_of(module: str) -> str:
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return path.read_text() if path.exists() else ""


@each_page
def test_modules_that_are_named_exist(page: Path) -> None:
    text = "\n".join(code(page.read_text()))
    named = {
        *re.findall(r"python -m ([\w.]+)", text),
        *re.findall(rf"^((?:{'|'.join(MODULES)})(?:\.\w+)+)$", text, re.MULTILINE),
    }
    for name in (each for each in named if each.split(".")[0] in MODULES and not each.endswith(".yaml")):
        module, _, attribute = name.rpartition(".")
        assert is_module(name) or (is_module(module) and attribute in source_of(module)), f"{page.name} names {name}"


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    """Checks `python -m knative …` up to a pipe, a comment or the next command."""
    for line in code(by_hand(page)):
        for words in re.findall(r"python -m knative ([a-z][^|;&#)]*)", line):
            name, *rest = words.split()
            command = command_line.get_command(click.Context(command_line), name)
            assert command is not None, f"{page.name}: python -m knative {name}"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
            assert used <= known | {"-h", "--help"}, f"{page.name}: {words}"


@each_page
def test_targets_and_variables_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in code(page.read_text()):
        command = re.match(r"make ((?:[a-z-]+ ?)+)((?:[A-Z_]+=)?)", line)
        for target in command[1].split() if command else ():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for variable in re.findall(r" ([A-Z_]+)=", line) if command else ():
            assert re.search(rf"^{variable} \?=", makefile, re.MULTILINE), f"{page.name}: {line}"


@each_page
def test_every_command_is_run_by_a_test_or_needs_a_cluster(page: Path) -> None:
    """A page with commands that need a cluster says so in its first paragraph."""
    tests_of_commands = "".join(path.read_text() for path in (ROOT / "tests" / "knative" / "commands").glob("test_*.py"))
    for line in commands(page):
        if line.startswith(NEEDS_A_CLUSTER):
            assert "cluster" in page.read_text().split("\n\n")[1], f"{page.name} does not say that it needs a cluster: {line}"
        elif command := re.match(rf"{PYTHON} -m knative ([a-z-]+)", line):
            assert f'"{command[1]}"' in tests_of_commands, f"{page.name}: no test runs {line}"
        elif not line.startswith("make "):
            assert line.startswith(tuple(RUN_BY)), f"{page.name}: no test runs {line}"


def test_tests_that_run_commands_exist() -> None:
    assert not [path for path in RUN_BY.values() if not (ROOT / path).exists()]


def test_the_map_leads_to_files_and_names() -> None:
    (table,) = tables(section((DOCS / "structures.md").read_text(), "Map"))
    rows = [row for row in table if row[1]]
    assert 30 <= len(rows) <= 45
    for question, in_files, look_for in rows:
        files = spans(in_files)
        assert files, question
        text = "".join((ROOT / file).read_text() for file in files)
        assert not [name for name in spans(look_for) if not re.search(rf"\b{name}\b", text)], f"{question} {look_for}"


def test_one_tokens_way_names_what_its_files_have() -> None:
    steps = re.findall(r"^\d\. .*$", section((DOCS / "structures.md").read_text(), "One token's way"), re.MULTILINE)
    assert len(steps) >= 5
    for step in steps:
        text = "".join((ROOT / span).read_text() for span in spans(step) if span.endswith(".py"))
        assert not [name for name in spans(step) if not name.endswith(".py") and not re.search(rf"\b{name}\b", text)], step


def test_the_vocabulary_has_at_most_forty_words() -> None:
    (table,) = tables(section((DOCS / "structures.md").read_text(), "Vocabulary"))
    assert len(table) <= 40
    assert all(meaning for _, meaning in table)


def test_the_readme_names_the_packages_of_each_folder() -> None:
    (table,) = tables(section((ROOT / "README.md").read_text(), "Folders"))
    named = {f"{spans(folder)[0]}{package}" for folder, _, in_folder in table for package in spans(in_folder)}
    assert named == {package for package in packages() if package.count("/") == 2}


def test_every_package_is_in_the_map() -> None:
    (table,) = tables(section((DOCS / "structures.md").read_text(), "Packages"))
    assert sorted(package for row in table for package in spans(row[0])) == sorted(packages())


def test_the_shown_plan_is_what_plan_prints() -> None:
    page = (DOCS / "scaling.md").read_text()
    command, shown = re.findall(r"(?:^    .+\n)+", page, re.MULTILINE)[:2]
    arguments = command.split()[1:]
    printed = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in printed.splitlines()]


def test_explained_messages_are_the_codes_own() -> None:
    """Checks the first column of every table of "Called at night"; `…` stands for a value."""
    rows = [row for table in tables(section((DOCS / "operating.md").read_text(), "Called at night")) for row in table]
    messages = [message for row in rows for message in spans(row[0])]
    assert len(messages) > 50
    assert not [message for message in messages if not any(message in text for text in strings_of_the_code())]


def test_named_settings_exist() -> None:
    """Checks what stands in backticks as `section.field`."""
    from knative.spec.pipeline_spec import PipelineSpec

    pages = ("deploying.md", "operating.md", "scaling.md", "security.md")
    text = "".join((DOCS / name).read_text() for name in pages) + section((DOCS / "structures.md").read_text(), "Contributing")
    fields = (ROOT / "knative" / "spec" / "pipeline_spec.py").read_text()
    for named, name in re.findall(r"`(stage|gateway|store|network|model|monitoring)\.(?:\w+\.)?([a-z]\w*)", text):
        assert named in PipelineSpec.__struct_fields__
        assert re.search(rf"^    {name}: ", fields, re.MULTILINE), f"{named}.{name}"


def test_named_keys_of_the_environment_exist() -> None:
    """Keys of functions, commands, the Makefile and tests."""
    readers = [ROOT / "Makefile", *(ROOT / path for path in source_files())]
    known = {key for path in readers for key in re.findall(r"\bLAMINA_[A-Z_]+\b", path.read_text())}
    for page in PAGES:
        unknown = set(re.findall(r"\bLAMINA_[A-Z_]+\b", page.read_text())) - known
        assert not unknown, f"{page.name} names {unknown}"


def test_the_picture_has_a_description_and_dark_colours() -> None:
    picture = ElementTree.parse(DOCS / "request.svg").getroot()
    said = {each.get("id"): (each.text or "").strip() for each in picture if each.tag.endswith(("}title", "}desc"))}
    assert sorted(picture.get("aria-labelledby", "").split()) == sorted(map(str, said))
    assert all(said.values())
    style = next(each.text or "" for each in picture if each.tag.endswith("}style"))
    assert "prefers-color-scheme: dark" in style
    used = {name for each in picture.iter() for name in each.get("class", "").split()}
    assert used <= set(re.findall(r"\.([a-z]\w*)", style))
