"""Random blocks of all formats: every code and integer scale, float scales of ordinary size."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks
from storage.models.blocks import FORMATS, BlockFormat, pack, read_blocks

IN_FILES = tuple(name for name, form in FORMATS.items() if form.split)  # formats of GGUF

# Bytes of a block at which float16 numbers begin, by format. MXFP4 has none.
_FLOAT16_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def random_rows(name: str, outs: int, width: int, seed: int = 0, largest: float = 1.0) -> NDArray[np.uint8]:
    """Rows as a GGUF file has them, uint8 [outs, bytes]. largest: about the largest weight, but for MXFP4."""
    form, draw = FORMATS[name], np.random.default_rng(seed)
    raw = draw.integers(0, 256, (outs, width // (32 * form.blocks), form.file_bytes)).astype(np.uint8)
    bits = 8 if form.table else form.low + form.high
    largest *= 2.0 ** -(bits + 5 * bool(form.factors))
    for start in _FLOAT16_AT[name]:
        ends = draw.standard_normal(raw.shape[:2]) * largest * 2.0 ** draw.integers(-4, 1, raw.shape[:2])
        ends.reshape(-1)[:2] = 6e-8, 0  # not normal, and zero
        raw[..., start : start + 2] = ends.astype(np.float16)[..., None].view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = draw.integers(120, 127, raw.shape[:2])
        raw[0, :, 0] = np.resize([0, 1, 2, 100], raw.shape[1])  # the least are not normal
    return raw.reshape(outs, -1)


def random_blocks(name: str, outs: int, width: int, seed: int = 0, largest: float = 1.0) -> Blocks:
    """Rows of any format."""
    form, draw = FORMATS[name], np.random.default_rng(seed)
    if form.split:
        return read_blocks(form, random_rows(name, outs, width, seed, largest))
    codes = draw.integers(0, 1 << form.low, (outs, width)).astype(np.uint8)
    codes[codes & 127 == 127] -= form.floats  # which are no numbers
    shape = (outs, width // (32 * form.blocks))
    scales = (
        draw.standard_normal(shape) * 2.0 ** draw.integers(-4, 1, shape) * largest / (448 if form.floats else 1 << form.low)
    )
    zeros = draw.integers(0, 1 << form.low, shape).astype(np.uint8) if form.zero else None
    return Blocks(codes, scales.astype(np.float32), zeros=zeros)


def packed(name: str, rows: Any) -> NDArray[np.uint8]:
    form: BlockFormat = FORMATS[name]
    whole: NDArray[np.uint8] = pack(form, read_blocks(form, rows))
    return whole
