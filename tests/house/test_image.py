"""The image is told by files that must agree: Containerfile, .containerignore, requirement lists, manifests, imports."""

import re
import sys
from importlib import metadata

import pytest
import yaml

from tests.support.house.imports import files_reached, imports
from tests.support.house.rootfs import stages
from tests.support.paths import ROOT

OWN = ("storage", "eventing", "functions")
COME_ALONG = {"werkzeug": "flask", "huggingface_hub": "transformers", "safetensors": "transformers"}
"""Imported, and part of another requirement."""


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {re.split(r"[<>=\[ ]", line)[0].lower() for line in lines if line and not line.startswith(("#", "-r"))}


def libraries_of_functions() -> set[str]:
    """Whatever `python -m functions` can come to import, also inside functions."""
    reached = files_reached(ROOT / "functions" / "__main__.py")
    tops = {name.split(".")[0] for path in reached for name in imports(path, for_types=False)}
    return tops - {*OWN} - sys.stdlib_module_names


@pytest.mark.slow
def test_pods_get_what_they_import_and_nothing_more() -> None:
    names = {
        module: found[0].lower().replace("_", "-") for module, found in metadata.packages_distributions().items()
    } | COME_ALONG
    wanted = {names[module] for module in libraries_of_functions() if module != "opentelemetry"}
    assert wanted == requirements("requirements-functions.txt") | requirements("requirements-torch.txt")


def test_every_list_takes_the_shorter_ones() -> None:
    lists = {name: (ROOT / f"{name}.txt").read_text() for name in ("requirements", "requirements-lean")}
    assert "-r requirements-functions.txt" in lists["requirements-lean"]
    assert "-r requirements-lean.txt\n-r requirements-torch.txt" in lists["requirements"]
    assert not requirements("requirements.txt"), "a full installation is the two lists"
    assert "-r requirements-compiler.txt" in lists["requirements-lean"]
    assert not requirements("requirements-lean.txt") & requirements("requirements-functions.txt")


def test_what_is_copied_is_let_through_and_nothing_else() -> None:
    copies = [step.value.split() for stage in stages().values() for step in stage.steps if step.instruction == "COPY"]
    copied = {source for words in copies if not words[0].startswith("--from=") for source in words[:-1]}
    lines = (ROOT / ".containerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert (ROOT / ".dockerignore").resolve() == ROOT / ".containerignore"


def test_both_targets_are_run_alike_and_lean_is_the_default() -> None:
    lean, full = stages()["lean"], stages()["full"]
    assert [*stages()][-1] == "lean"
    for each in ("environment", "workdir", "user", "entrypoint"):
        assert getattr(lean, each) == getattr(full, each), each
    assert lean.base == "libraries"
    assert stages()["libraries-full"].base == "libraries"


def test_the_image_is_what_manifests_say() -> None:
    file = stages()["lean"]
    assert file.entrypoint == ("python", "-m", "functions")
    for manifest in (ROOT / "examples" / "smollm2-cpu" / "rendered").glob("[sg]*.yaml"):
        pod = yaml.safe_load(manifest.read_text())["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert "command" not in container
        assert file.user.split(":")[0] == str(container["securityContext"]["runAsUser"])
        assert f"EXPOSE {container['ports'][0]['containerPort']}" in (ROOT / "Containerfile").read_text()
        assert file.environment["HOME"] in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_no_registry_and_no_index_is_committed() -> None:
    assert stages()["libraries"].base == "python:3.11-slim"
    assert stages(BASE="registry.example/python:3")["libraries"].base == "registry.example/python:3"
    assert stages()["libraries-full"].arguments["TORCH_INDEX"] == ""
    assert "://" not in (ROOT / "Containerfile").read_text()
