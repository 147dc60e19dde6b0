"""Draws tokens and computes log-probabilities in numpy, if C cannot be used.

Results equal those of `native.sampler` to the bit, but take longer.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from functions.grammars.matcher import Allowed
from functions.stage.models.floats import Array
from functions.stage.native.sampler import Draw

_LOWEST: Final = np.float32(-87)  # tokens whose score is farther below the greatest have weight 0
_WEIGHT_STEPS: Final = 2.0**40  # weights are summed as integers: the order of a sum does not matter
_LOGARITHM: Final = (
    0.15313837699209373,
    0.1818357216161805,
    0.22222198432149784,
    0.2857142874366239,
    0.3999999999940942,
    0.6666666666666735,
)


def draw(wanted: Draw) -> int | None:
    """Draws one token, with the same result as `native.sampler.draw`.

    Returns None if the greatest logit or score is not finite.
    """
    logits = wanted.logits
    if not math.isfinite(logits.max()):
        return None
    if wanted.allowed is not None:
        logits = masked(logits, wanted.allowed)
    scores = logits / np.float32(wanted.temperature or 1)
    if not math.isfinite(scores.max()):
        return None
    if wanted.temperature == 0:
        return int(scores.argmax())
    weights, tokens = keep(scores, wanted.top_k, wanted.top_p, wanted.min_p)
    tokens, weights = tokens[weights > 0], weights[weights > 0]
    variates = _variates(wanted.seed, wanted.position, tokens)
    return int(tokens[np.argmin(variates / weights.astype(np.float64))])


def softmax(scores: Array, count: int) -> tuple[float, list[int]]:
    """Returns the same as `native.sampler.softmax`, to the bit."""
    total = np.rint(_weights(scores).astype(np.float64) * _WEIGHT_STEPS).astype(np.int64).sum()
    log_sum = _logarithm(np.array([float(total) / _WEIGHT_STEPS]))
    return float(log_sum[0]), np.argsort(-scores, kind="stable")[:count].tolist()


def masked(scores: Array, allowed: Allowed) -> Array:
    """Returns a copy of the scores in which tokens that are not allowed have -infinity."""
    bits = np.unpackbits(allowed.view(np.uint8), count=min(len(scores), 32 * len(allowed)), bitorder="little")
    found = np.full_like(scores, -np.inf)
    np.copyto(found[: len(bits)], scores[: len(bits)], where=bits.view(np.bool_))
    return found


def keep(scores: Array, top_k: int, top_p: float, min_p: float) -> tuple[Array, npt.NDArray[np.int64]]:
    """Applies top-k, top-p and min-p to float32 scores [vocab]. Returns the weights of the tokens that remain, and their ids.

    A weight is exp(score - greatest score).
    """
    weights = _weights(scores)
    tokens = np.argsort(-scores, kind="stable")  # of equal scores the lowest id first
    if 0 < top_k < len(tokens):
        tokens = tokens[scores[tokens] >= scores[tokens[top_k - 1]]]
    if top_p < 1:
        masses = np.rint(weights[tokens].astype(np.float64) * _WEIGHT_STEPS).astype(np.int64)
        tokens = tokens[np.cumsum(masses) - masses < top_p * float(masses.sum())]
    tokens = np.sort(tokens[weights[tokens] >= np.float32(min_p)])
    return weights[tokens], tokens


def _weights(scores: Array) -> Array:
    """Returns exp(score - greatest score), computed like `weigh` in `functions/stage/native/c/sampler.inc.h`."""
    x = scores - scores.max()
    limited = np.maximum(x, _LOWEST)
    n = np.rint(limited * np.float32(1.44269504))
    r = limited - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    y = np.full_like(r, 1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + np.float32(factor)
    y = y * (r * r) + r + np.float32(1)
    return np.where(x < _LOWEST, np.float32(0), y * ((n.astype(np.int32) + 127) << 23).view(np.float32))


def _variates(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns an exponential variate for each of `tokens`, which must be sorted.

    A variate depends only on the seed, the position and the token's id. numpy keeps the stream of raw Philox numbers stable
    across versions.
    """
    raw = np.random.Philox(key=[seed, 0], counter=[0, position, 0, 0]).random_raw(int(tokens[-1]) + 1)[tokens]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -_logarithm(np.minimum(uniform, 1 - 2.0**-53))


def _logarithm(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the natural logarithm, computed as in `functions/stage/native/c/sampler.inc.h`.

    numpy's own logarithm differs between CPUs.
    """
    fraction, exponent = np.frexp(x)
    is_small = fraction < 0.7071067811865476
    fraction, exponent = np.where(is_small, fraction * 2, fraction), (exponent - is_small).astype(np.float64)
    f = fraction - 1
    s = f / (2 + f)
    z = s * s
    r = np.full_like(z, 0.14798198605116586)
    for factor in _LOGARITHM:
        r = r * z + factor
    logarithm: npt.NDArray[np.float64] = exponent * 0.6931471803691238 + (
        s * (r * z) + exponent * 1.9082149292705877e-10 + 2 * s
    )
    return logarithm
