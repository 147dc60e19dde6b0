"""Processes in which some libraries are not installed: their imports are refused, in children, too."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

from tests.support.paths import ROOT

HEAVY: Final = ("torch", "transformers", "accelerate", "safetensors")
"""What a lean installation leaves out, and what comes only with that."""
_REFUSAL: Final = """
import sys
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {libraries}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refusal())
"""


def refusal(libraries: Collection[str]) -> str:
    """Code to run first: after it, importing these libraries fails."""
    return _REFUSAL.format(libraries=sorted(libraries))


def environment_without(libraries: Collection[str], folder: Path) -> dict[str, str]:
    """This process's, with a `sitecustomize` in `folder` that every Python which gets it runs at its start."""
    (folder / "sitecustomize.py").write_text(refusal(libraries))
    return {**os.environ, "PYTHONPATH": str(folder)}


def run_without(libraries: Collection[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments; its output is text."""
    environ = environment_without(libraries, folder)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
