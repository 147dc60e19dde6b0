"""Weights rounded to four bits: for every block of 32 the scale and the minimum that leave the least square error.

Where the smallest and the largest weight of a block become 0 and 15, the others often fit badly. So some scales around that
one are tried: each rounds the weights to 0 … 15, least squares over those gives scale and minimum, and the best is kept.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage.models.floats import Floats
from storage.models.q4 import BLOCK

_LARGEST: Final = 15
_TRIED: Final = (15.0, 13.8, 14.4, 15.6, 16.2, 16.8)
"""Steps between a block's smallest and largest weight. docs/log.md has what more of them gain."""

Halves = NDArray[np.float16]
Quants = NDArray[np.uint8]


def quantize(rows: Floats) -> tuple[Quants, Halves, Halves]:
    """rows [outs, width] → q 0 … 15 [outs, width], scales and minima [outs, blocks], as `q4.pack` takes them.

    A scale or minimum beyond float16 is infinite.
    """
    outs, width = rows.shape
    blocks = _in_blocks(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = _best_ends(blocks)
        scales, minima = (end.astype(np.float16) for end in ends)
        quants = _rounded(blocks, minima.astype(np.float32), _inverse(scales.astype(np.float32))).astype(np.uint8)
    return quants.reshape(outs, -1)[:, :width], scales.reshape(outs, -1), minima.reshape(outs, -1)


def _in_blocks(rows: Floats) -> Floats:
    """[blocks, 32]. A last block that is not whole repeats its row's last weight."""
    if odd := -rows.shape[1] % BLOCK:
        rows = np.pad(rows, ((0, 0), (0, odd)), mode="edge")
    return rows.reshape(-1, BLOCK)


def _best_ends(blocks: Floats) -> tuple[Floats, Floats]:
    """Scales and minima [blocks]."""
    mean = blocks.mean(axis=1)
    centred = blocks - mean[:, None]  # else the sums below lose the digits in which near weights differ
    lowest, highest = centred.min(axis=1), centred.max(axis=1)
    best_error = np.full(len(blocks), np.inf, np.float32)
    scales, minima = np.zeros_like(mean), np.zeros_like(mean)
    for steps in _TRIED:
        quants = _rounded(centred, lowest, np.float32(steps) * _inverse(highest - lowest))
        scale, minimum = _least_squares(centred, quants)
        quants *= scale[:, None]
        quants += minimum[:, None]
        quants -= centred
        error = np.einsum("ij,ij->i", quants, quants)
        better = error < best_error
        best_error[better], scales[better], minima[better] = error[better], scale[better], minimum[better]
    return scales, minima + mean


def _rounded(blocks: Floats, minima: Floats, inverse_scales: Floats) -> Floats:
    """q of every weight, still as floats."""
    quants = blocks - minima[:, None]
    quants *= inverse_scales[:, None]
    np.rint(quants, out=quants)
    return np.clip(quants, 0, _LARGEST, out=quants)


def _least_squares(centred: Floats, quants: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum with the least sum of (scale * q + minimum - weight)², for weights whose mean is 0."""
    mean_q = quants.mean(axis=1)
    spread = np.einsum("ij,ij->i", quants, quants) - BLOCK * mean_q * mean_q
    scale = np.einsum("ij,ij->i", quants, centred) * _inverse(spread)
    return scale, -scale * mean_q


def _inverse(numbers: Floats) -> Floats:
    """1 / number; 0 of a 0, as all weights of a block are alike then."""
    return np.divide(1, numbers, out=np.zeros_like(numbers), where=numbers != 0)
