"""Holds the direction of imports and the owners of heavy libraries, by reading the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = ("storage", "eventing", "functions", "knative")
"""A folder may import those before it, never those behind it."""

OWNERS: dict[str, tuple[str, ...]] = {
    "boto3": ("storage/store/object_store.py",),
    "kubernetes": ("knative/cluster/client.py",),
    "botocore": ("storage/store/object_store.py",),
    "transformers": (
        "functions/stage/models/transformers/group.py",
        "functions/stage/models/transformers/cache.py",
        "storage/checkpoints/hugging_face_folder.py",
        "storage/checkpoints/model_description.py",
    ),
    "torch": ("functions/stage/", "storage/models/conversion.py"),
    "numba": ("functions/stage/native/",),
    "llvmlite": ("functions/stage/native/",),
    "gguf": ("storage/checkpoints/gguf_checkpoint.py",),
    "huggingface_hub": ("storage/checkpoints/model_source.py", "storage/checkpoints/model_description.py"),
    "flask": ("functions/",),
    "gunicorn": ("functions/hosting/server.py",),
    "tokenizers": (
        "functions/gateway/text/tokenizer.py",
        "functions/gateway/text/text_stream.py",
        "storage/checkpoints/gguf_tokenizer.py",
    ),
    "jinja2": ("functions/gateway/text/chat_template.py",),
    "opentelemetry": ("functions/observing/tracing_export.py",),
    "aiohttp": ("knative/",),
    "rich": ("knative/",),
}
"""Library → the files, or folders, that may import it."""


def source_files() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            yield node.module or ""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", source_files(), ids=name)
def test_imports_point_one_way(path: Path) -> None:
    layer = name(path).split("/")[0]
    behind = set(LAYERS[LAYERS.index(layer) + 1 :])
    wrong = {module for module in imports(path) if module.split(".")[0] in behind | {"tests", "bench"}}
    assert not wrong, f"{name(path)} imports {sorted(wrong)}; the direction is {' ← '.join(LAYERS)}"


@pytest.mark.parametrize("path", source_files(), ids=name)
def test_heavy_libraries_have_owners(path: Path) -> None:
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


def test_files_stay_short() -> None:
    long = {name(path): n for path in source_files() if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"past 400 lines a file is two files: {long}"
