"""The prefix cache: prefixes are found by content, copied or taken over, and evicted when memory is needed."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, chain_key, extended
from functions.stage.engine.prefix_cache import CachedPrefix, PrefixCache
from functions.stage.models.kv_cache import GOING_BACK, KVArena, KVBudget, KVCacheFull

KEY = chain_key("0" * 32, "")
BLOCKS = 12  # of the arena


WINDOW = 20


class TokenPool(KVArena):
    """Blocks that hold a token's id in place of its keys and values."""

    def __init__(self, blocks: int, windows: Sequence[int | None]) -> None:
        super().__init__(blocks * len(windows), BLOCK_TOKENS, 1, windows)
        self.arena = np.full((blocks * len(windows), BLOCK_TOKENS), -1)

    def places(self, handle: int, row: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        blocks, offsets = np.divmod(np.arange(first, end), BLOCK_TOKENS)
        return self.tables[handle][row, blocks % self.need.ring_blocks if self.windowed[row] else blocks], offsets

    def _copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.arena[targets] = self.arena[sources]


class Stage:
    """Sequences over a pool. The arena holds a token's id in place of its keys and values."""

    def __init__(self, blocks: int = BLOCKS, windows: Sequence[int | None] = (None, None)) -> None:
        self.kv = TokenPool(blocks, windows)
        self.cache = PrefixCache(self.kv, self.leaving)
        self.evicted: list[Chain] = []

    def leaving(self, prefix: CachedPrefix) -> None:
        assert self.cache.longest(prefix.chain)[1] == BLOCK_TOKENS * len(prefix.chain)
        self.evicted.append(prefix.chain)

    def begin(self, tokens: list[int], more: int = 1) -> tuple[int, int]:
        """Begins a sequence and computes the tokens that it lacks. Returns handle and tokens found. Raises KVCacheFull."""
        chain = extended((), tokens[:-1], KEY)
        handle = self.cache.reserve(len(tokens) + more, chain)
        held = self.cache.fill(handle, chain)
        self.check(handle, tokens[:held])
        self.compute(handle, tokens)
        return handle, held

    def compute(self, handle: int, tokens: list[int]) -> None:
        while (held := self.kv.length(handle)) < len(tokens):
            end = min(held + GOING_BACK, len(tokens))
            for row in range(len(self.kv.windowed)):
                self.kv.arena[self.kv.places(handle, row, held, end)] = tokens[held:end]
            self.kv.extend(handle, end - held)

    def check(self, handle: int, tokens: list[int]) -> None:
        """The next token after `tokens` finds all that it attends to."""
        if not tokens:
            return
        assert self.kv.holds(handle, len(tokens))
        for row, windowed in enumerate(self.kv.windowed):
            first = max(0, len(tokens) - WINDOW + 1) if windowed else 0
            assert self.kv.arena[self.kv.places(handle, row, first, len(tokens))].tolist() == tokens[first:]

    def end(self, handle: int, tokens: list[int]) -> None:
        self.cache.end(handle, extended((), tokens, KEY))


def text(seed: int, blocks: float) -> list[int]:
    return random.Random(seed).choices(range(1000), k=int(blocks * BLOCK_TOKENS))


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    assert stage.cache.free_tokens == stage.kv.free_tokens + stage.cache.cached_tokens
    assert stage.kv.free_units == stage.kv._is_free.sum()


def test_a_follow_up_turn_takes_over_the_cached_blocks_and_takes_others_wherever_they_are(stage: Stage) -> None:
    first = text(1, 3.5)
    handle, held = stage.begin(first)
    assert held == 0
    blocks = stage.kv.tables[handle][:, :3]
    other, _ = stage.begin(text(3, 2))
    stage.end(handle, first)
    again, held = stage.begin(first + text(2, 5))
    assert held == 3 * BLOCK_TOKENS
    assert (stage.kv.tables[again][:, :3] == blocks).all(), "nothing was copied"
    assert stage.cache.cached_tokens == 0
    stage.cache.drop(other)


def test_a_shared_prefix_is_copied_even_from_a_running_sequence(stage: Stage) -> None:
    prompt = text(1, 2)
    handle, _ = stage.begin([*prompt, 1])
    other, held = stage.begin([*prompt, *text(2, 1)])
    assert held == 2 * BLOCK_TOKENS
    stage.check(handle, prompt)
    stage.end(handle, [*prompt, 1])
    assert stage.cache.cached_tokens == 0, "the other one holds all of it"
    stage.end(other, [*prompt, *text(2, 1)])
    third, held = stage.begin([*prompt, *text(4, 1)])
    assert held == 2 * BLOCK_TOKENS
    assert stage.cache.cached_tokens == 3 * BLOCK_TOKENS, "the source of the copy stays cached"
    stage.cache.drop(third)


def test_tokens_computed_meanwhile_are_found_by_a_second_search(stage: Stage) -> None:
    prompt = [*text(1, 4), 1]
    chain = extended((), prompt[:-1], KEY)
    first, second = stage.cache.reserve(70, chain), stage.cache.reserve(70, chain)
    assert stage.cache.fill(second, chain) == 0
    stage.compute(first, prompt[: 2 * BLOCK_TOKENS + 3])
    assert stage.cache.fill(second, chain) == 2 * BLOCK_TOKENS
    stage.check(second, prompt[: 2 * BLOCK_TOKENS])


def test_rejected_draft_tokens_are_not_taken_for_the_answer_that_replaced_them(stage: Stage) -> None:
    """The sequence migrated away with draft tokens, and comes back before it was released here."""
    prompt = text(1, 2)
    handle = stage.cache.reserve(5 * BLOCK_TOKENS, extended((), prompt, KEY))
    stage.compute(handle, prompt + text(2, 1))
    answer = prompt + text(3, 2)
    chain = extended((), answer, KEY)
    assert stage.cache.fill(handle, chain) == len(prompt)
    other = stage.cache.reserve(len(answer) + 1, chain)
    assert stage.cache.fill(other, chain) == len(prompt)


def test_what_was_handed_over_beyond_whole_blocks_is_kept_by_a_second_search(stage: Stage) -> None:
    """Another stage still restores, so that the same reservation is asked again."""
    sequence = text(1, 2.5)
    chain = extended((), sequence, KEY)
    handle = stage.cache.reserve(4 * BLOCK_TOKENS, chain)
    stage.compute(handle, sequence)
    assert stage.cache.fill(handle, chain) == 2 * BLOCK_TOKENS
    assert stage.kv.length(handle) == len(sequence)
    stage.check(handle, sequence)
    stage.end(handle, sequence)


def test_a_different_continuation_keeps_the_cached_one(stage: Stage) -> None:
    one, other = text(1, 2) + text(2, 1), text(1, 2) + text(3, 1)
    handle, _ = stage.begin([*one, 1])
    stage.end(handle, one)
    handle, held = stage.begin([*other, 1])
    assert held == 2 * BLOCK_TOKENS
    stage.end(handle, other)
    assert [prefix.chain for prefix in stage.cache.cached()] == [extended((), other, KEY), extended((), one, KEY)]


def test_the_least_recently_used_prefixes_are_evicted_first(stage: Stage) -> None:
    texts = [text(seed, 3) for seed in range(4)]
    for tokens in texts:
        handle, _ = stage.begin(tokens, more=0)
        stage.end(handle, tokens)
    assert stage.cache.free_tokens == stage.kv.capacity_tokens
    assert stage.evicted == []
    handle, _ = stage.begin(text(9, 5), more=0)
    assert stage.evicted == [extended((), tokens, KEY) for tokens in texts[:2]]
    whole, _ = stage.begin(text(10, 7), more=0)
    assert stage.cache.cached_tokens == 0
    with pytest.raises(KVCacheFull):
        stage.begin([1], more=0)
    stage.cache.drop(whole)
    stage.cache.drop(handle)


def test_a_reservation_that_cannot_fit_evicts_nothing(stage: Stage) -> None:
    running, _ = stage.begin(text(1, 8), more=0)
    handle, _ = stage.begin([*text(2, 2), 1])
    stage.end(handle, text(2, 2))
    with pytest.raises(KVCacheFull):
        stage.begin(text(3, 5), more=0)
    assert stage.cache.cached_tokens == 2 * BLOCK_TOKENS
    assert stage.evicted == []
    stage.cache.drop(running)


def test_a_follow_up_evicts_others_before_it_loses_its_own_prefix(stage: Stage) -> None:
    tokens, other = text(1, 6), text(2, 3)
    for each in (tokens, other):
        handle, _ = stage.begin([*each, 1], more=0)
        stage.end(handle, each)
    running, held = stage.begin(tokens + text(4, 6), more=0)
    assert held == len(tokens)
    assert stage.evicted == [extended((), other, KEY)]
    with pytest.raises(KVCacheFull):
        stage.begin([1], more=0)
    stage.cache.drop(running)


@pytest.mark.parametrize("longer", [40, GOING_BACK - 20, GOING_BACK + 200, 3000])
def test_with_windows_a_prefix_is_found_as_long_as_rings_still_hold_it(longer: int) -> None:
    stage = Stage(blocks=1000, windows=(None, WINDOW))
    prompt = text(1, 20)
    handle, _ = stage.begin([*prompt, *text(2, longer / BLOCK_TOKENS)])
    other, held = stage.begin([*prompt, 5])
    assert held == (len(prompt) if longer <= GOING_BACK else 0)
    stage.end(other, prompt)
    stage.end(handle, [*prompt, *text(2, longer / BLOCK_TOKENS)])
    _, held = stage.begin([*prompt, 7])
    assert held == len(prompt), "the shorter one was not replaced by the longer one, which no longer holds it"


def test_a_cache_without_blocks_caches_no_prefix() -> None:
    kv = KVBudget(100)
    cache = PrefixCache(kv)
    chain = extended((), text(1, 2), KEY)
    handle = cache.reserve(40, chain)
    kv.extend(handle, 20)
    assert cache.fill(handle, chain) == 20, "a second search drops nothing"
    cache.end(handle, chain)
    assert cache.fill(cache.reserve(40, chain), chain) == 0
    assert cache.free_tokens == 60


turns = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(turns, st.integers(0, 2**32))
@pytest.mark.parametrize("windows", [(None, None), (None, WINDOW, WINDOW), (WINDOW,)])
def test_any_mix_of_conversations_finds_the_right_keys_and_values(
    windows: Sequence[int | None], turns: list[tuple[int, int, bool]], seed: int
) -> None:
    """Conversations continue, share prefixes, branch and run at the same time in an arena that is too small for them."""
    dice = random.Random(seed)
    blocks = BLOCKS if windows == (None, None) else 5 * BLOCKS
    stage = Stage(blocks, windows)
    talks = [text(0, 1.5) for _ in range(6)]
    running: list[tuple[int, list[int]]] = []
    for number, more, ends in turns:
        talks[number] = (talks[number] + dice.choices(range(1000), k=more * blocks // BLOCKS))[: BLOCK_TOKENS * blocks // 2]
        try:
            running.append((stage.begin(talks[number])[0], list(talks[number])))
        except KVCacheFull:
            assert running
        if running and (ends or len(running) > 3):
            stage.end(*running.pop(dice.randrange(len(running))))
        for handle, tokens in running:
            stage.check(handle, tokens)
        free = blocks * len(windows) - sum(stage.kv.units(handle) for handle, _ in running)
        assert stage.cache.free_tokens == stage.kv.need.tokens(free)
    for handle, tokens in running:
        stage.end(handle, tokens)
    assert stage.cache.free_tokens == stage.kv.capacity_tokens


@pytest.mark.slow
def test_the_prefix_cache_does_not_grow_beyond_the_arena() -> None:
    stage = Stage(blocks=200)
    sizes = []
    for number in range(10_000):
        tokens = text(number, 3)
        handle, _ = stage.begin([*tokens, 1])
        stage.end(handle, tokens)
        if number % 100 == 99:
            sizes.append((len(stage.cache._holders), stage.cache.cached_tokens))
    assert max(sizes) <= (200, 200 * BLOCK_TOKENS)
    assert min(sizes[1:]) >= (150, 150 * BLOCK_TOKENS)
