"""Pages say what is so: links lead somewhere, files and commands that are named exist, messages are those of the code."""

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
    code,
    paths_of,
    rooms,
    section,
    source_files,
    spans,
    strings_of_the_code,
    tables,
)
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
FOLDERS = ("bench", "docs", "eventing", "examples", "functions", "knative", "monitoring", "storage", "tests")
PACKAGES = ("bench", "eventing", "functions", "knative", "storage", "tests")

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
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in DOCS.glob("*.md") if f"](docs/{page.name})" not in readme]


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
    """By their whole path, by a pattern of one, or by its end: as much as no other file has, or the page names the room."""
    named = spans(page.read_text())
    here = tuple(room for room in rooms() if {room, room.rstrip("/")} & set(named))
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
        *re.findall(rf"^((?:{'|'.join(PACKAGES)})(?:\.\w+)+)$", text, re.MULTILINE),
    }
    for name in (each for each in named if each.split(".")[0] in PACKAGES and not each.endswith(".yaml")):
        module, _, attribute = name.rpartition(".")
        assert is_module(name) or (is_module(module) and attribute in source_of(module)), f"{page.name} names {name}"


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    """Of `python -m knative`, up to a pipe, a comment or the next command. What `--help` itself says is left out."""
    by_hand = page.read_text().partition("<!-- begin commands -->")[0]
    for line in code(by_hand):
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


def test_the_map_leads_to_rooms_and_files() -> None:
    assert "](docs/structures.md)" in (ROOT / "README.md").read_text()
    (table,) = tables(section((DOCS / "structures.md").read_text(), "Where is …?"))
    rows = [row for row in table if row[1]]
    assert len(rows) >= 15
    for question, in_rooms, in_files, look_for in rows:
        known = rooms()
        named, files = spans(in_rooms), spans(in_files)
        assert named, question
        assert set(named) <= known, f"{question} {set(named) - known} are no rooms"
        assert files, question
        assert all(file.startswith(tuple(named)) for file in files), f"{question} {files} are not in {named}"
        text = "".join((ROOT / file).read_text() for file in files)
        assert not [name for name in spans(look_for) if not re.search(rf"\b{name}\b", text)], f"{question} {look_for}"


def test_the_readme_names_the_rooms_of_each_folder() -> None:
    (table,) = tables(section((ROOT / "README.md").read_text(), "Folders"))
    named = {f"{spans(folder)[0]}{room}" for folder, _, in_folder in table for room in spans(in_folder)}
    assert named == {room for room in rooms() if room.count("/") == 2}


def test_every_room_is_in_the_map() -> None:
    (table,) = tables(section((DOCS / "structures.md").read_text(), "Rooms"))
    assert sorted(room for row in table for room in spans(row[0])) == sorted(rooms())


def test_the_plan_that_is_shown_is_the_one_that_is_printed() -> None:
    page = (DOCS / "scaling.md").read_text()
    command, shown = re.findall(r"(?:^    .+\n)+", page, re.MULTILINE)[:2]
    arguments = command.split()[1:]
    printed = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in printed.splitlines()]


def test_messages_that_are_explained_are_the_codes_own() -> None:
    """The first column of every table for the one who is called at night, `…` standing for what is filled in."""
    rows = [row for table in tables(section((DOCS / "operating.md").read_text(), "Called at night")) for row in table]
    messages = [message for row in rows for message in spans(row[0])]
    assert len(messages) > 50
    assert not [message for message in messages if not any(message in text for text in strings_of_the_code())]


def test_settings_that_are_named_exist() -> None:
    """In backticks, as `section.field`."""
    from knative.spec.pipeline_spec import PipelineSpec

    pages = ("deploying.md", "operating.md", "scaling.md", "security.md")
    text = "".join((DOCS / name).read_text() for name in pages) + section((DOCS / "structures.md").read_text(), "Contributing")
    fields = (ROOT / "knative" / "spec" / "pipeline_spec.py").read_text()
    for named, name in re.findall(r"`(stage|gateway|store|network|model|monitoring)\.(?:\w+\.)?([a-z]\w*)", text):
        assert named in PipelineSpec.__struct_fields__
        assert re.search(rf"^    {name}: ", fields, re.MULTILINE), f"{named}.{name}"


def test_the_picture_can_be_read_aloud_and_in_the_dark() -> None:
    picture = ElementTree.parse(DOCS / "request.svg").getroot()
    said = {each.get("id"): (each.text or "").strip() for each in picture if each.tag.endswith(("}title", "}desc"))}
    assert sorted(picture.get("aria-labelledby", "").split()) == sorted(map(str, said))
    assert all(said.values())
    style = next(each.text or "" for each in picture if each.tag.endswith("}style"))
    assert "prefers-color-scheme: dark" in style
    used = {name for each in picture.iter() for name in each.get("class", "").split()}
    assert used <= set(re.findall(r"\.([a-z]\w*)", style))
