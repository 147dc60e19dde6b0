"""Decides whether layers can run in C, from dtype, device and sizes. Imports no heavy library."""

from collections.abc import Mapping
from typing import Final

DTYPES: Final = ("float32", "bfloat16", "int8", "q4", "kept")
MOST_HEAD: Final = 1024  # largest head_dim: LAMINA_MOST_HEAD of `c/native.h`
SCALE_BYTES: Final = 4  # of the scale of a key or value in 8 bits: LAMINA_SCALE_BYTES


def obstacle(dtype: str, device: str, sizes: Mapping[str, int]) -> str | None:
    """Returns the reason why layers cannot run in C, as part of a sentence for logs. None if they can run.

    dtype: of the published model. sizes: sizes by their names in a config.json; only head_dim is read.
    """
    if device != "cpu":
        return f"they are on {device}"
    if dtype not in DTYPES:
        return f"{dtype} is not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
    head_dim = sizes["head_dim"]
    if head_dim % 2:
        return f"head_dim {head_dim} is odd"
    return f"head_dim {head_dim} is over {MOST_HEAD}" if head_dim > MOST_HEAD else None


def padded_head(head_dim: int) -> int:
    """Returns how many numbers a key or value of one head takes in the KV arena: head_dim rounded up to a multiple of 16."""
    return -(-head_dim // 16) * 16
