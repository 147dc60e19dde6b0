"""Where the states of recurrent layers are kept, and which of them are dropped."""

from functions.stage.models.checkpoints import SPACING_TOKENS, Checkpoints


def kept(checkpoints: Checkpoints[int], handle: int, end: int = 2**20) -> list[int]:
    return [tokens for tokens in range(end) if checkpoints.last(handle, tokens) == tokens > 0]


def computed(checkpoints: Checkpoints[int], handle: int, end: int, chunk: int) -> None:
    """Computes a sequence in chunks, and keeps what it is asked for. A state is its position."""
    for first in range(0, end, chunk):
        for tokens in sorted(checkpoints.positions(handle, first, min(end, first + chunk))):
            checkpoints.put(handle, tokens, tokens)


def test_the_last_block_the_ends_of_prompts_and_spaced_positions_are_kept_whatever_the_chunks() -> None:
    for chunk in (1, 7, 64, 1000):
        checkpoints = Checkpoints[int](100)
        checkpoints.ask(3, 48)
        computed(checkpoints, 3, 2 * SPACING_TOKENS + 37, chunk)
        assert kept(checkpoints, 3, 1100) == [48, SPACING_TOKENS, 2 * SPACING_TOKENS, 2 * SPACING_TOKENS + 32]
        checkpoints.truncate(3, SPACING_TOKENS + 1)
        assert kept(checkpoints, 3, 1100) == [48, SPACING_TOKENS]
        checkpoints.release(3)
        assert len(checkpoints) == 0


def test_a_last_block_stays_if_it_is_asked_for_later() -> None:
    checkpoints = Checkpoints[int](100)
    computed(checkpoints, 0, 40, 8)
    checkpoints.ask(0, 32)
    computed(checkpoints, 0, 80, 8)
    assert kept(checkpoints, 0, 100) == [32, 80]


def test_beyond_the_budget_the_least_recently_used_is_dropped() -> None:
    checkpoints = Checkpoints[int](3)
    for handle in range(3):
        checkpoints.put(handle, 16, handle)
    assert checkpoints.get(0, 16) == 0
    checkpoints.put(3, 16, 3)
    assert [checkpoints.get(handle, 16) for handle in range(4)] == [0, None, 2, 3]
    assert Checkpoints[int](0).positions(0, 0, 4096) == set(), "no budget"
