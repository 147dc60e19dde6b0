"""Every list of requirements has a complete lock that agrees with it, and the tests run in what is locked."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

WITHOUT_HASHES = ("torch", "clients")  # both hold torch, and which build of it comes depends on the machine
LISTS = sorted(path.stem.removeprefix("requirements-") for path in ROOT.glob("requirements-*.txt") if ".lock" not in path.name)
WITHOUT_DEPENDENCIES = {
    entry["name"] for entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["dependency-metadata"]
}
CUDA = re.compile(r"(nvidia-|cuda-|triton)")

each_list = pytest.mark.parametrize("name", LISTS)


def requirements(path: Path) -> Iterator[Requirement]:
    """The list's own requirements and those of the lists that it includes."""
    for line in re.sub(r"#.*", "", path.read_text()).split("\n"):
        if line.startswith("-r"):
            yield from requirements(ROOT / line.split()[1])
        elif line.strip():
            yield Requirement(line)


def pins(name: str) -> dict[str, str]:
    """Package to version, as locked for this platform and Python."""
    locked = (ROOT / f"requirements-{name}.lock.txt").read_text()
    entries = (Requirement(entry) for entry in re.findall(r"^([^\s#][^\\\n]*?)\s*\\?$", locked, re.MULTILINE))
    return {
        canonicalize_name(entry.name): str(entry.specifier)[2:]
        for entry in entries
        if not entry.marker or entry.marker.evaluate()
    }


def pins_with_torch(name: str) -> dict[str, str]:
    return pins("torch") | pins(name)


@each_list
def test_a_lock_satisfies_its_list(name: str) -> None:
    locked = pins_with_torch(name)
    for requirement in requirements(ROOT / f"requirements-{name}.txt"):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: make lock"
        assert requirement.specifier.contains(version), f"{requirement} is locked to {version}: make lock"


@pytest.mark.parametrize("name", [name for name in LISTS if not name.startswith("clients")])
def test_a_lock_is_complete(name: str) -> None:
    """Whatever a locked package requires is locked, too. Packages of tests/clients are not installed here."""
    locked = pins_with_torch(name)
    for package in pins(name).keys() - WITHOUT_DEPENDENCIES:
        try:
            required = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue  # of make bench alone
        for requirement in map(Requirement, required):
            wanted = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if wanted and not CUDA.match(requirement.name):
                assert canonicalize_name(requirement.name) in locked, f"{package} requires {requirement}: make lock"


@each_list
def test_every_package_of_a_lock_has_hashes(name: str) -> None:
    locked = (ROOT / f"requirements-{name}.lock.txt").read_text()
    packages = re.findall(r"^[^\s#].*==.*(?:\n    --hash=.*)*", locked, re.MULTILINE)
    assert all(("--hash=sha256:" in package) != (name in WITHOUT_HASHES) for package in packages)


def test_locks_that_share_an_environment_agree() -> None:
    seen: dict[str, str] = {}
    for name in LISTS:
        if not name.startswith("clients"):
            for package, version in pins(name).items():
                assert seen.setdefault(package, version) == version, f"{package} is {version} in the lock of {name}: make lock"


def test_the_tests_run_in_what_is_locked() -> None:
    has_torch = any(each.name == "torch" for each in metadata.distributions())  # make test-fast has none
    for package, version in (pins_with_torch("test") if has_torch else pins("test")).items():
        installed = metadata.version(package)
        assert installed.partition("+")[0] == version, f"{package} {installed} is installed, {version} is locked: make setup"


def test_locks_name_no_index() -> None:
    for path in ROOT.glob("requirements-*.txt"):
        assert "://" not in path.read_text(), f"{path.name} names a host"
