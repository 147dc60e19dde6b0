"""The sampler's filters are transformers' own; its draws are a pure function and follow the distribution."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eventing.wire.events import Sampling
from functions.stage.engine import numpy_sampler
from functions.stage.engine.numpy_sampler import keep
from functions.stage.engine.sampler import log_probabilities
from functions.stage.native import sampler as native_sampler
from functions.stage.native.layers import NativeThreads
from functions.stage.native.library import library
from tests.support.functions.sampling import sample as sample_one
from tests.support.functions.stage_pipeline import whole_model
from tests.support.storage import tiny_models

VOCAB = 1211
THREADS = NativeThreads(library())
THREADS.count = 3


Logits = npt.NDArray[np.float32]


def random_logits(seed: int, rows: int = 1) -> Logits:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)).mul_(3).numpy()


def sample(
    logits: Any, samplings: Sequence[Sampling], positions: Sequence[int], histories: Sequence[Sequence[int]], *allowed: Any
) -> list[int | None]:
    """A token for each row of logits."""
    masks = allowed[0] if allowed else [None] * len(samplings)
    return [sample_one(*row) for row in zip(logits, samplings, positions, histories, masks, strict=True)]


def processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


TINY = st.floats(min_value=0, exclude_min=True, max_value=1e-30)
"""Down to the least number above 0: float32 takes many of them for 0, and overflows with the others."""


@given(
    sampling=st.builds(
        Sampling,
        temperature=st.just(0.0) | TINY | st.floats(0, 100),
        top_k=st.sampled_from([0, 1, 2, 2**31 - 1, 2**70]),
        top_p=TINY | st.floats(0, 1, exclude_min=True),
        min_p=st.just(0.0) | TINY | st.floats(0, 1),
        repetition_penalty=TINY | st.floats(0, 100, exclude_min=True),
        seed=st.sampled_from([0, 2**63 - 1]),
    ),
    row=st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -math.inf]), min_size=5, max_size=5),
    history=st.lists(st.integers(0, 4)),
)
def test_every_sampling_value_draws_a_token_whatever_the_logits(
    sampling: Sampling, row: list[float], history: list[int]
) -> None:
    logits = np.array([row, [0.0, 1.0, 2.0, 3.0, 4.0]], np.float32)
    extreme, ordinary = sample(logits, [sampling, Sampling()], [2**24, 0], [history, []])
    assert ordinary == 4, "the row beside it"
    if math.isfinite(max(row)):
        assert extreme is not None
        assert row[extreme] > -math.inf, "a token that cannot come"
    else:
        assert extreme is None


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-50])
def test_a_tiny_temperature_is_greedy(temperature: float, top_p: float) -> None:
    logits = random_logits(5, rows=20)
    cold = Sampling(temperature=temperature, top_p=top_p, seed=1)
    assert sample(logits, [cold] * 20, list(range(20)), [[]] * 20) == logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_penalty_prefers_seen_tokens_in_their_order(temperature: float) -> None:
    logits = np.array([[3.0, 1.0, 2.0, -1.0]], np.float32)
    for penalty in (1e-38, 1e-42, 5e-324):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
        assert sample(logits, [sampling], [9], [[1, 2, 3]]) == [2]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_no_token(wrong: float) -> None:
    logits = random_logits(6, rows=3)
    logits[1, 7 if wrong > -math.inf or math.isnan(wrong) else slice(None)] = wrong
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)):
        first, second, third = sample(logits, [sampling] * 3, [1, 2, 3], [[5]] * 3)
        assert second is None
        assert None not in (first, third)


def test_the_order_of_filters_is_that_of_generate() -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, pad_token_id=0
    )
    chain = whole_model("llama")._get_logits_processor(config, input_ids_seq_length=1)
    mine = processors(Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2))
    assert [type(processor) for processor in chain] == [type(processor) for processor in mine]


def is_decided_by_rounding(logits: npt.NDArray[np.float32], sampling: Sampling) -> bool:
    """Whether a token lies so close to the bound of top_p or min_p that float32 decides whether it is kept."""
    scaled = np.sort(logits.astype(np.float64) / sampling.temperature)[::-1][: sampling.top_k or None]
    probabilities = np.exp(scaled - scaled[0]) / np.exp(scaled - scaled[0]).sum()
    masses = np.cumsum(probabilities)
    is_close_to_top_p = sampling.top_p < 1 and np.abs(masses - sampling.top_p).min() < 1e-5
    return bool(is_close_to_top_p or np.abs(probabilities / probabilities[0] - sampling.min_p)[1:].min(initial=1) < 1e-6)


@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 7, 50, VOCAB, 10 * VOCAB]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_the_filters_keep_what_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed)
    assume(not is_decided_by_rounding(logits[0], sampling))
    expected = processors(sampling)(torch.zeros(1, 1, dtype=torch.int64), torch.tensor(logits))[0]
    weights, tokens = keep(logits[0] / np.float32(temperature), top_k, top_p, min_p)
    assert tokens.tolist() == expected.isfinite().nonzero()[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(weights / weights.sum()), expected[tokens].softmax(dim=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("history", [[1, 2, 3, 3, 3], [5], list(range(VOCAB))])
def test_the_repetition_penalty_equals_transformers(history: list[int]) -> None:
    for seed in range(20):
        logits = random_logits(seed)
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), torch.tensor(logits)).argmax().item()
        assert sample(logits, [Sampling(repetition_penalty=1.7)], [9], [history]) == [expected]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, [200, 17, 90]] = 2.0
    assert sample(logits, [Sampling(), Sampling()], [0, 0], [[], []]) == [0, 17]


def test_greedy_generation_with_a_penalty_equals_generates() -> None:
    model = whole_model("llama")
    prompt = [5, 9, 33]
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, repetition_penalty=1.5
    )[0].tolist()
    tokens = list(prompt)
    while len(tokens) < len(expected):
        logits = tiny_models.all_logits(model, tokens)[-1:].numpy()
        (token,) = sample(logits, [Sampling(repetition_penalty=1.5)], [len(tokens)], [tokens])
        assert token is not None
        tokens.append(token)
    assert tokens == expected


def test_a_draw_depends_only_on_logits_sampling_seed_and_position() -> None:
    logits = random_logits(1, rows=64)
    samplings = [Sampling(temperature=1.0, seed=row, top_k=(0, 40)[row % 2]) for row in range(64)]
    positions = list(range(100, 164))
    together = sample(logits, samplings, positions, [[]] * 64)
    alone = [sample(logits[n : n + 1], [samplings[n]], [positions[n]], [[7]])[0] for n in reversed(range(64))]
    assert together == alone[::-1]
    assert len(set(together)) > 10


def test_recorded_draws_never_change() -> None:
    """Replays may run on another version of this code: the generator must never change."""
    logits = np.arange(211, dtype=np.float32)[None] / 40
    draws = [sample(logits, [Sampling(temperature=1.0, seed=seed)], [position], [[]])[0] for seed, position in CASES]
    assert draws == EXPECTED_DRAWS


CASES = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 2**24), (42, 1000)]
EXPECTED_DRAWS = [197, 204, 184, 194, 210, 125]


RECORDED = (
    (Sampling(temperature=1.0), [807, 529, 660, 653, 569, 39, 148, 95]),
    (Sampling(temperature=0.7, top_k=40), [27, 491, 686, 183, 122, 127, 116, 718]),
    (Sampling(temperature=1.3, top_p=0.9), [10, 918, 646, 31, 120, 313, 898, 538]),
    (Sampling(temperature=2.0, min_p=0.05), [220, 358, 951, 724, 428, 135, 633, 928]),
    (Sampling(temperature=0.0, repetition_penalty=1.3), [731, 32, 352, 319, 638, 961, 614, 104]),
    (
        Sampling(temperature=0.9, top_k=200, top_p=0.8, min_p=0.02, repetition_penalty=1.1),
        [436, 315, 645, 76, 5, 868, 380, 776],
    ),
    (Sampling(temperature=50.0, top_p=0.97), [503, 681, 535, 250, 918, 717, 677, 130]),
    (Sampling(temperature=1e-40, top_p=0.5), [186, 393, 593, 991, 455, 532, 743, 394]),
)
"""Draws of an earlier sampler made of torch's operators, for eight seeds each."""


@pytest.mark.parametrize("case", range(len(RECORDED)))
def test_filtered_draws_are_those_that_were_recorded(case: int) -> None:
    sampling, expected = RECORDED[case]
    drawn = []
    for number in range(8):
        seed = 8 * case + number
        drawn += sample(
            recorded_logits(seed), [msgspec.structs.replace(sampling, seed=seed)], [100 * number], [range(0, 1000, 3)]
        )
    assert drawn == expected


def recorded_logits(number: int) -> Logits:
    """Exact whatever computes them: integers times a power of two."""
    raw = np.random.Philox(key=[number, 7]).random_raw(1000) >> np.uint64(40)
    return (raw.astype(np.float32) * np.float32(2.0**-20) - np.float32(8))[None]


def test_draws_follow_the_softmax_of_the_kept_scores() -> None:
    logits = np.array([[0.0, 1.0, 2.0, -1.0, 0.5, -20.0]], np.float32)
    weights, tokens = keep(logits[0] / np.float32(0.8), 4, 1.0, 0.0)
    expected = dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))
    counts = dict.fromkeys(range(6), 0)
    draws = 20_000
    for position in range(draws // 2):
        for seed in (3, 4):
            (token,) = sample(logits, [Sampling(temperature=0.8, top_k=4, seed=seed)], [position], [[]])
            assert token is not None
            counts[token] += 1
    for token, count in counts.items():
        probability = expected.get(token, 0.0)
        assert abs(count / draws - probability) <= 4 * math.sqrt(probability * (1 - probability) / draws), token


SPREADS: Any = st.sampled_from([0.0, 0.05, 1.0, 3.0, 30.0, 1e4, 1e37])
DRAWS: Any = st.tuples(
    st.sampled_from([0.0, 1e-40, 0.7, 1.0, 30.0]),  # temperature
    st.sampled_from([0, 1, 2, 40, 650, 2**31 - 1]),  # top_k
    st.sampled_from([1.0, 0.9999999999999999, 0.999999, 0.9, 0.3, 5e-324]),  # top_p
    st.sampled_from([0.0, 1e-9, 0.05, 1.0]),  # min_p
    st.integers(0, 2**63 - 1),  # seed
    st.sampled_from([0, 1, 2**24]),  # position
)


@pytest.mark.parametrize("level", library().levels)
@given(
    seed=st.integers(0, 2**63 - 1),
    size=st.integers(1, 700),
    spread=SPREADS,
    impossible=st.floats(0, 1),
    rounded=st.booleans(),
    wanted=st.lists(DRAWS, min_size=1, max_size=6),
)
def test_every_level_and_number_of_threads_draws_as_numpy_does(
    level: str,
    seed: int,
    size: int,
    spread: float,
    impossible: float,
    rounded: bool,
    wanted: list[tuple[float, int, float, float, int, int]],
) -> None:
    dice = np.random.default_rng(seed)

    def draws() -> Iterator[native_sampler.Draw]:
        for temperature, top_k, *others in wanted:
            scores = (dice.standard_normal(size) * spread).astype(np.float32)
            scores = np.round(scores) if rounded else scores  # many equal scores
            scores[dice.random(size) < impossible] = -np.inf
            scores[dice.integers(size)] = dice.choice([0.5, 0.5, 0.5, np.nan, np.inf])
            allowed = dice.integers(0, 2**32, dice.integers(1, 25), np.uint32) if dice.integers(2) else None
            yield native_sampler.Draw(scores, temperature, min(top_k, size), *others, allowed=allowed)

    together = list(draws())
    before = library().level
    try:
        library().use_level(level)
        with np.errstate(all="ignore"):
            expected = [numpy_sampler.draw(draw) for draw in together]
        assert native_sampler.draw(together) == native_sampler.draw(together, THREADS) == expected
        scores = dice.standard_normal(size).astype(np.float32)
        count = int(dice.integers(0, min(size, 20) + 1))
        assert native_sampler.softmax(scores, count) == numpy_sampler.softmax(scores, count)
    finally:
        library().use_level(before)


def test_log_probabilities_are_the_log_softmax() -> None:
    logits = random_logits(3, rows=4)
    tokens = np.array([0, 5, 1210, 17])
    expected = [math.log(torch.tensor(logits[row]).softmax(dim=-1)[token]) for row, token in enumerate(tokens)]
    assert [logprob for logprob, _ in log_probabilities(logits, tokens)] == pytest.approx(expected, abs=1e-5)


# The OpenAI API's penalties and biases, and banned tokens.


def adjusted(scores: list[float], position: int = 5, history: list[int] | None = None, **sampling: Any) -> int | None:
    (token,) = sample(np.array([scores], np.float32), [Sampling(**sampling)], [position], [history or []])
    return token


def test_presence_and_frequency_penalties_count_only_after_the_prompt() -> None:
    scores, history = [3.0, 2.5, 2.0, 0.0], [0, 0, 0, 1, 1, 2]
    assert adjusted(scores, history=history) == 0
    # After a prompt of three tokens, 1 came twice and 2 once.
    assert adjusted([0.0, 2.5, 2.0, 0.0], history=history, prompt_tokens=3, presence_penalty=1.0) == 1
    assert adjusted([0.0, 2.5, 2.0, 0.0], history=history, prompt_tokens=3, frequency_penalty=1.0) == 2
    assert adjusted(scores, history=history, prompt_tokens=3, presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert adjusted(scores, history=history, prompt_tokens=0, presence_penalty=2.0) == 0


def test_a_bias_moves_its_token_and_is_ignored_outside_the_vocabulary() -> None:
    assert adjusted([3.0, 2.0, 1.0], logit_bias={2: 5.0}) == 2
    assert adjusted([3.0, 2.0, 1.0], logit_bias={0: -100.0}) == 1
    assert adjusted([3.0, 2.0, 1.0], logit_bias={99: 100.0}) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-40])
def test_banned_tokens_are_not_drawn_before_their_position(temperature: float) -> None:
    banned = {"banned": (0, 99), "banned_until": 10, "temperature": temperature}
    assert adjusted([30.0, 2.0, -50.0], position=9, **banned) == 1
    assert adjusted([30.0, 2.0, -50.0], position=10, **banned) == 0
    assert adjusted([30.0], position=9, **banned) == 0, "where nothing else is there"


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=20), st.data())
def test_any_sampling_draws_a_token_of_the_vocabulary(scores: list[float], data: st.DataObject) -> None:
    tokens = st.integers(0, len(scores) + 2)
    history = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=10))
    token = adjusted(
        scores,
        data.draw(st.integers(0, 12)),
        history,
        temperature=data.draw(st.sampled_from([0.0, 1e-30, 0.7, 100.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1e-9, 1.3])),
        presence_penalty=data.draw(st.floats(-2, 2)),
        frequency_penalty=data.draw(st.floats(-2, 2)),
        prompt_tokens=data.draw(st.integers(0, 12)),
        logit_bias=data.draw(st.dictionaries(tokens, st.floats(-100, 100), max_size=4)),
        banned=tuple(data.draw(st.lists(tokens, max_size=3))),
        banned_until=data.draw(st.integers(0, 12)),
    )
    assert token is not None
    assert 0 <= token < len(scores)


@pytest.mark.parametrize(
    "values", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.0}, {"logit_bias": {5: 9.0}}]
)
def test_a_mask_restricts_the_draw_to_allowed_tokens(values: dict[str, Any]) -> None:
    """The same as if the model gave the other tokens no chance; whether the mask is shorter than the vocabulary or longer."""
    dice = np.random.default_rng(2)
    for position in range(50):
        row = dice.normal(size=64).astype(np.float32)
        mask = dice.random(int(dice.choice([40, 64, 80]))) < 0.3
        mask[7] = True
        bits = np.packbits(np.pad(mask, (0, -len(mask) % 32)), bitorder="little").view(np.uint32)
        sampling = Sampling(**({"temperature": 1.0, "seed": position} | values))
        impossible = np.where(np.pad(mask, (0, 64))[:64], row, -np.inf).astype(np.float32)
        (token,) = sample([row], [sampling], [position], [[1, 7]], [bits])
        assert token is not None
        assert mask[token]
        assert [token] == sample([impossible], [sampling], [position], [[1, 7]])
