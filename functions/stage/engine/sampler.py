"""Samples tokens from logits, as a pure function of logits, sampling values, seed and position.

Filters are those of transformers' `generate`, in its order: repetition penalty, temperature, top-k, top-p, min-p. Before the
temperature come the OpenAI API's penalties, biases and banned tokens, and before everything a grammar's mask. If values are
so small that float32 overflows, the same is computed in float64: every `Sampling` draws a token.

The draw takes the token with the largest score plus Gumbel noise, which is a draw from the softmax of the scores. The noise
comes from a counter-based generator (Philox) keyed by seed and position, one number for each token of the vocabulary. So a
replay draws the same token, whatever the batch, the cut or the machine. Logits that are rounded differently in another batch
change the outcome of this comparison far more seldom than that of a cumulative sum over the vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from eventing.wire.events import Sampling

Floats = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
TopLogprobs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities

GREEDY: Final = Sampling()
_FIRST_NUCLEUS: Final = 512  # most probable tokens in which top-p looks first: a quarter of the time of sorting 49k tokens
_LEAST_DIVISOR: Final = 1e-100  # smaller divisors order the tokens no differently: any float32 divided by this is larger


def draw(
    logits: Floats, sampling: Sampling, token_ids: Sequence[int], position: int, allowed: Sequence[Mask] | None = None
) -> list[int]:
    """Draws the next token of a sequence, and one more after each draft token that is accepted: one that was drawn, too.

    Returns the tokens drawn, none if the first logits are not finite. logits: float32 [draft tokens + 1, vocab]. token_ids: of
    the sequence, draft tokens at the end. position: of the first token drawn. allowed: the grammar's masks, for the first token
    and for the token after each draft token that the grammar allows; None: there is no grammar.
    """
    drawn: list[int] = []
    for row in logits:
        mask = None if allowed is None else allowed[len(drawn)]
        token = sample(row, sampling, position, token_ids[:position] if sampling.adjusts else (), mask)
        if token is None:
            break
        drawn.append(token)
        is_accepted_draft = len(drawn) < len(logits) and token == token_ids[position]
        if not is_accepted_draft or (allowed is not None and len(drawn) == len(allowed)):
            break
        position += 1
    return drawn


def sample(
    logits: Floats, sampling: Sampling, position: int, history: Sequence[int], allowed: Mask | None = None
) -> int | None:
    """Draws a token from float32 logits [vocab]. None if the greatest logit is not finite.

    At temperature 0 the token with the greatest logit is taken, of several equal ones the lowest token id.

    position: of the token that is drawn. history: all tokens before it, prompt included, used only if there is a penalty.
    allowed: True for tokens that may be drawn, at least one; tokens beyond its end are not allowed. None: all are.
    """
    greatest = int(logits.argmax())  # the first NaN, if there is one
    if not math.isfinite(logits[greatest]):
        return None
    is_allowed = allowed is None or (greatest < len(allowed) and allowed[greatest])
    if sampling.temperature == 0 and not sampling.adjusts and is_allowed:
        return greatest
    with np.errstate(all="ignore"):  # overflow is detected, and computed in float64
        return _sample_adjusted(logits, sampling, position, history, allowed)


def log_probabilities(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int] | Tokens, most_probable: int = 0
) -> list[tuple[float, TopLogprobs]]:
    """The log-probability of each of `token_ids` [n] under `logits`, float32 [n, vocab], and each row's most probable tokens.

    most_probable: how many of these. Of equally probable tokens the lowest id comes first; tokens of probability 0 are left
    out. Logarithms are natural, and taken before penalties, temperature and filters. A row with a NaN or an infinite maximum
    gives NaN. Works row by row, so that memory stays at one row.
    """
    found: list[tuple[float, TopLogprobs]] = []
    with np.errstate(all="ignore"):
        for row, token in zip(logits, token_ids, strict=True):
            greatest = row.max()
            log_sum = math.log(np.exp(row - greatest).sum())
            top: list[tuple[int, float]] = []
            for each in _largest(row, min(most_probable, len(row))) if most_probable else ():
                logprob = float(row[each] - greatest) - log_sum
                if math.isfinite(logprob):
                    top.append((int(each), logprob))
            found.append((float(row[int(token)] - greatest) - log_sum, tuple(top)))
    return found


def _sample_adjusted(scores: Floats, sampling: Sampling, position: int, history: Sequence[int], mask: Mask | None) -> int:
    if mask is not None:
        masked = np.full_like(scores, -np.inf)
        known = min(len(scores), len(mask))
        np.copyto(masked[:known], scores[:known], where=mask[:known])
        scores = masked
    adjusted = _adjust(scores, sampling, position, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        if not math.isfinite(adjusted.max()):
            adjusted = _adjust_widely(scores, sampling, position, history)
        return int(adjusted.argmax())
    scaled = adjusted / sampling.temperature
    if not math.isfinite(scaled.max()):
        adjusted = _adjust_widely(scores, sampling, position, history)
        # The greatest score becomes 0, those far below it -inf.
        scaled = ((adjusted - adjusted.max()) / max(sampling.temperature, _LEAST_DIVISOR)).astype(np.float32)
    # Only allowed tokens are filtered: mostly a small part of the vocabulary.
    kept_scores, tokens = keep(scaled, sampling, None if mask is None else np.flatnonzero(mask[: len(scaled)]))
    noise = _gumbel(sampling.seed, position, len(scores), tokens)
    return int(tokens[np.argmax(kept_scores.astype(np.float64) + noise)])


def _adjust_widely(scores: Floats, sampling: Sampling, position: int, history: Sequence[int]) -> Floats:
    """As `_adjust`, in float64, for values that overflow float32. Returns `scores` unchanged if all tokens are banned."""
    penalty = max(sampling.repetition_penalty, _LEAST_DIVISOR)
    adjusted = _adjust(scores.astype(np.float64), sampling, position, history, penalty)
    return adjusted if math.isfinite(adjusted.max()) else scores.astype(np.float64)


def _adjust(scores: Floats, sampling: Sampling, position: int, history: Sequence[int], repetition_penalty: float) -> Floats:
    """Applies the penalties, biases and bans of `sampling`; a copy unless there are none.

    Ignores tokens outside the vocabulary.
    """
    if not sampling.adjusts:
        return scores
    adjusted = scores.copy()
    if repetition_penalty != 1:
        seen = np.unique(np.asarray(history, dtype=np.int64))
        of_seen = scores[seen]
        adjusted[seen] = np.where(of_seen < 0, of_seen * repetition_penalty, of_seen / repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        drawn, times = np.unique(np.asarray(history[sampling.prompt_tokens :], dtype=np.int64), return_counts=True)
        adjusted[drawn] -= (sampling.presence_penalty + sampling.frequency_penalty * times).astype(adjusted.dtype)
    for token, bias in sampling.logit_bias.items():
        if token < len(adjusted):
            adjusted[token] += bias
    if position < sampling.banned_until:
        adjusted[[token for token in sampling.banned if token < len(adjusted)]] = -np.inf
    return adjusted


def keep(scores: Floats, sampling: Sampling, tokens: Tokens | None = None) -> tuple[Floats, Tokens]:
    """Applies top-k, top-p and min-p to float32 scores [vocab]. Returns the scores of the tokens that remain, and their ids.

    tokens: ids that may remain, ascending; None: all.
    """
    tokens = np.arange(len(scores)) if tokens is None else tokens
    if 0 < sampling.top_k < len(tokens):
        among = scores[tokens]
        tokens = tokens[among >= np.partition(among, -sampling.top_k)[-sampling.top_k]]
    if sampling.top_p < 1:
        tokens = tokens[_nucleus(_softmax(scores[tokens]), sampling.top_p)]
    if sampling.min_p:
        probabilities = _softmax(scores[tokens])
        tokens = tokens[probabilities >= np.float32(sampling.min_p) * probabilities.max()]
    return scores[tokens], tokens


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max())
    probabilities: Floats = powers / powers.sum()
    return probabilities


def _nucleus(probabilities: Floats, top_p: float) -> Tokens:
    """Indexes of the smallest set of tokens, the most probable first, whose probabilities add up to at least `top_p`."""
    for size in (_FIRST_NUCLEUS, len(probabilities)):
        order = _largest(probabilities, min(size, len(probabilities)))
        largest = probabilities[order]
        reached = np.cumsum(largest, dtype=np.float64).astype(np.float32) - largest >= top_p
        reached[0] = False  # even if top_p rounds to 0
        kept = order[~reached]
        if len(kept) < len(order):
            break
    return kept


def _largest(probabilities: Floats, count: int) -> Tokens:
    """Indexes of the `count` largest numbers, largest first; of equal ones the lowest index first."""
    some = np.sort(np.argpartition(probabilities, -count)[-count:])
    order: Tokens = some[np.argsort(-probabilities[some], kind="stable")]
    return order


def _gumbel(seed: int, position: int, vocab_size: int, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for `tokens`. A token's number depends only on seed, position and the token's id.

    numpy keeps the stream of raw Philox numbers stable across versions.
    """
    raw = np.random.Philox(key=[seed, 0], counter=[0, position, 0, 0]).random_raw(vocab_size)[tokens]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))
