"""Holds the direction of imports and the owners of heavy libraries, by reading the source."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.house.imports import imports
from tests.support.paths import ROOT

# A folder may import those before it, never those after it.
LAYERS = ("storage", "eventing", "functions", "knative")

# Library → the files, or folders, that may import it.
OWNERS: dict[str, tuple[str, ...]] = {
    "boto3": ("storage/store/object_store.py",),
    "kubernetes": ("knative/cluster/client.py",),
    "botocore": ("storage/store/object_store.py",),
    "transformers": (
        "functions/stage/models/transformers/",
        "storage/checkpoints/hugging_face_folder.py",
        "storage/checkpoints/model_description.py",
        "storage/checkpoints/recurrent_layers.py",
        "storage/models/checks.py",
    ),
    "torch": (
        "functions/stage/models/build.py",
        "functions/stage/models/llama/",
        "functions/stage/models/torch_adapters.py",
        "functions/stage/models/torch_border.py",
        "functions/stage/models/transformers/",
        "storage/models/checks.py",
    ),
    "cryptography": ("storage/kv/sealed.py", "knative/cluster/certificates.py"),
    "gguf": ("storage/checkpoints/gguf_checkpoint.py",),
    "huggingface_hub": ("storage/checkpoints/model_source.py", "storage/checkpoints/model_description.py"),
    "flask": ("functions/",),
    "httptools": ("functions/hosting/requests.py", "eventing/http/delivery.py", "knative/local/http/"),
    "tokenizers": (
        "functions/gateway/text/control_tokens.py",
        "functions/gateway/text/encoder.py",
        "functions/gateway/text/tokenizer.py",
        "functions/gateway/text/text_stream.py",
        "storage/checkpoints/gguf_tokenizer.py",
    ),
    "jinja2": ("functions/gateway/text/chat_template.py",),
    "llguidance": ("functions/grammars/",),
    "opentelemetry": ("functions/observing/tracing_export.py",),
    "aiohttp": ("knative/",),
    "rich": ("knative/",),
}


@cache
def source_files() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


@cache
def packages() -> list[str]:
    """Every folder with an `__init__.py`, by its dotted name."""
    return sorted(".".join(path.parent.relative_to(ROOT).parts) for path in source_files() if path.name == "__init__.py")


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).glob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    return module if module in packages() else module.rpartition(".")[0]


def docstring_of(package: str) -> str:
    return ast.get_docstring(tree(ROOT / package.replace(".", "/") / "__init__.py")) or ""


def may_import(package: str) -> set[str]:
    """Packages that the docstring allows: their own files, or with `.*` everything below them."""
    allowed = docstring_of(package).partition("\n\nMay import: ")[2].rstrip(".")
    return set() if allowed == "nothing of Lamina" else set(re.split(r",\s+", allowed))


@cache
def modules_imported(path: Path) -> frozenset[str]:
    """Modules of Lamina that the file imports anywhere; `from package import module` is the module."""
    known = {module_name(other) for other in source_files()}
    return frozenset(each if each in known else each.rpartition(".")[0] for each in imports(path)) & known


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
def test_imports_point_one_way() -> None:
    for path in source_files():
        later = set(LAYERS[LAYERS.index(name(path).split("/")[0]) + 1 :])
        wrong = {module for module in imports(path) if module.split(".")[0] in later | {"tests", "bench"}}
        assert not wrong, f"{name(path)} imports {sorted(wrong)}; the direction is {' ← '.join(LAYERS)}"


def test_a_package_says_what_lives_there() -> None:
    for package in packages():
        said, _, allowed = docstring_of(package).partition("\n\nMay import: ")
        assert len(said.split()) >= 5, f"{package}/__init__.py does not say what lives there"
        assert allowed, f"{package}/__init__.py does not say what it may import"
        unknown = {each.removesuffix(".*") for each in may_import(package)} - set(packages())
        assert not unknown, f"{package} may import {unknown}, which are no packages"


def test_a_package_imports_what_it_names_and_nothing_else() -> None:
    for package in packages():
        allowed = may_import(package)
        used = {package_of(module) for path in files_of(package) for module in modules_imported(path)}
        idle = {each for each in allowed if not any((other + ".").startswith(each.removesuffix("*")) for other in used)}
        assert not idle, f"{package} does not import {sorted(idle)}: take it out of its __init__.py"
        of_whole = tuple(each.removesuffix("*") for each in allowed if each.endswith(".*"))
        wrong = {each for each in used - allowed - {package} if not each.startswith(of_whole)}
        assert not wrong, f"{package} imports {sorted(wrong)}, which its __init__.py does not name"


def test_no_import_circle() -> None:
    """Includes imports inside functions and imports for types only."""
    assert_no_circle({module_name(path): set(modules_imported(path)) - {module_name(path)} for path in source_files()})


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' → '.join(reversed(error.args[1]))}")


def test_packages_of_a_folder_point_one_way() -> None:
    """Checks packages of one folder as wholes, with everything below them."""
    for folder in ("storage", "eventing", "functions.gateway", "functions.stage", "knative", "knative.local"):
        graph: dict[str, set[str]] = {package: set() for package in packages() if package.rpartition(".")[0] == folder}
        for path in source_files():
            here = next((package for package in graph if module_name(path).startswith(package + ".")), None)
            for module in modules_imported(path) if here else ():
                graph[here] |= {package for package in graph if package != here and (module + ".").startswith(package + ".")}
        assert_no_circle(graph)


def test_gateway_and_stage_know_nothing_of_each_other() -> None:
    for one, other in (("gateway", "stage"), ("stage", "gateway")):
        for path in (ROOT / "functions" / one).rglob("*.py"):
            wrong = [module for module in imports(path) if module.startswith(f"functions.{other}")]
            assert not wrong, f"{name(path)} imports {wrong}"


def test_local_knative_stands_alone() -> None:
    """knative/local with knative/webhook is used without the rest: it reaches eventing, and no other package of Lamina."""
    reached: set[str] = set()
    waiting = {"knative", *(module_name(path) for path in source_files() if name(path).startswith("knative/local/"))}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        waiting |= modules_imported(path) - reached
    others = {each for each in reached if not re.match(r"knative$|knative\.(local|webhook)\b|eventing\b", each)}
    assert not others, f"knative/local reaches {sorted(others)}"


def test_heavy_libraries_have_owners() -> None:
    for path in source_files():
        for module in imports(path):
            owners = OWNERS.get(module.split(".")[0])
            assert owners is None or name(path).startswith(owners), f"{name(path)} imports {module}, which belongs to {owners}"


def test_owners_exist() -> None:
    for library, owners in OWNERS.items():
        for owner in owners:
            assert (ROOT / owner).exists(), f"{owner}, owner of {library}, does not exist"


@pytest.mark.parametrize("package", ["storage", "eventing", "knative"])
def test_importing_a_package_loads_no_torch(package: str) -> None:
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_class_name_has_one_home() -> None:
    homes: dict[str, list[str]] = {}
    for path in source_files():
        for each in re.findall(r"^ *class ([A-Za-z]\w*)[(:\[]", path.read_text(), re.MULTILINE):
            homes.setdefault(each, []).append(name(path))
    assert not {each: paths for each, paths in homes.items() if len(paths) > 1}
