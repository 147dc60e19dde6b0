"""`import eventing` loads no heavy library, because every function and the CLI import it."""

import subprocess
import sys

from tests.support.paths import ROOT

HEAVY = ("torch", "numpy", "boto3", "botocore", "flask", "transformers", "tokenizers", "kubernetes", "aiohttp")


def test_no_file_loads_a_heavy_library() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "eventing").rglob("[!_]*.py"))]
    assert len(modules) > 5
    code = f"import sys, {', '.join(['eventing', *modules])}; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
