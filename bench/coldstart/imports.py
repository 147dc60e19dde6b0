"""How long a process takes to import what its role needs, from its start to its end."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

PROGRAMS: Final = {
    "import torch": "import torch",
    "native stage": """
import functions.__main__
from functions.hosting.imports import without_collection
with without_collection():
    import functions.hosting.server, functions.observing.telemetry, functions.stage.serving.function
with without_collection():
    import functions.stage.engine.engine, functions.stage.models.build, functions.stage.models.native.group
""",
    "gateway": """
import functions.__main__
from functions.hosting.imports import without_collection
with without_collection():
    import functions.hosting.server, functions.observing.telemetry, functions.gateway.function
""",
}
"""Role → what its start imports (tests/functions/hosting/test_start.py holds the real start to it)."""


def measure_imports(rounds: int, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of whole processes, in turn."""
    figures: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, code in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
            figures[name].append(time.perf_counter() - began)
            tell(f"{name}: {figures[name][-1]:.2f} s")
    return figures
