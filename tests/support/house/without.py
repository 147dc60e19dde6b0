"""A process in which some libraries are not installed: `python -c` with their imports refused."""

import subprocess
import sys
from collections.abc import Collection, Mapping
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
    """What to run ahead of the code that is to do without these."""
    return _REFUSAL.format(libraries=sorted(libraries))


def run_without(
    libraries: Collection[str], code: str, *arguments: str, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `code` with these arguments; its output is text."""
    command = [sys.executable, "-c", refusal(libraries) + code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
