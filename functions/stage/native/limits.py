"""What native layers do not run, in words that a log and a plan can give. Imports no numba."""

from collections.abc import Mapping
from typing import Final

from functions.stage.native.shapes import STEP

DTYPES: Final = ("bfloat16", "int8")


def obstacle(dtype: str, device: str, sizes: Mapping[str, int]) -> str | None:
    """Why layers of these sizes, by their names in a config.json, cannot run in machine code; None: they can."""
    if device != "cpu":
        return f"they are on {device}"
    if dtype not in DTYPES:
        return f"{dtype} is not {' or '.join(DTYPES)}"
    odd = [f"{name} {size}" for name, size in sizes.items() if size % STEP]
    return f"{' and '.join(odd)} cannot be divided by {STEP}" if odd else None
