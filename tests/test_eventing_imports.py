"""What importing `eventing` costs: no file of it loads a heavy library, because every function and the CLI import it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "boto3", "botocore", "flask", "transformers", "tokenizers", "kubernetes", "aiohttp")


def test_no_file_loads_a_heavy_library() -> None:
    modules = [f"eventing.{path.stem}" for path in sorted((ROOT / "eventing").glob("[!_]*.py"))]
    assert len(modules) > 5
    code = f"import sys, {', '.join(['eventing', *modules])}; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
