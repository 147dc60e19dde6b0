"""What is drafted: what stood behind the last tokens where they stood before."""

import random

import pytest

from functions.gateway.scheduling.speculation import MATCH_TOKENS, MAX_LOOKED_UP_TOKENS, PromptLookup


def naively(tokens: list[int], most: int) -> tuple[tuple[int, ...], int]:
    """Every place, the longest of the lengths that are looked for, the latest of them."""
    for match in sorted(MATCH_TOKENS, reverse=True):
        for end in range(len(tokens) - 1, match - 1, -1):
            if tokens[end - match : end] == tokens[-match:] and match < len(tokens):
                behind = tokens[end:]
                return tuple((behind * most)[:most]), match
    return (), 0


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_suffix_wins_and_its_latest_place(seed: int) -> None:
    dice = random.Random(seed)
    # 1 and 2**24 have the same bytes in other places: a match must begin where a token does.
    tokens = [dice.choice([0, 1, 256, 2**16, 2**24]) for _ in range(60)]
    lookup = PromptLookup(tokens[:20])
    for drawn in range(20, 60):
        assert lookup.draft(5) == naively(tokens[:drawn], 5)
        lookup.add(tokens[drawn])


def test_nothing_is_drafted_behind_what_is_new() -> None:
    assert PromptLookup([1]).draft(4) == ((), 0)
    assert PromptLookup([1, 2, 3]).draft(4) == ((), 0)
    assert PromptLookup([5, 1, 2, 5]).draft(4) == ((), 0), "one token stands in too many places"


def test_what_repeats_itself_is_taken_to_go_on() -> None:
    assert PromptLookup([9, 1, 2, 3, 1, 2, 3]).draft(7)[0] == (1, 2, 3, 1, 2, 3, 1)


def test_an_answer_is_expected_to_begin_with_its_prediction_and_to_come_back_to_it() -> None:
    lookup = PromptLookup([1, 2, 3], predicted=[10, 11, 12, 13, 14, 15])
    assert lookup.draft(3)[0] == (10, 11, 12)
    lookup.add(10)
    assert lookup.draft(3)[0] == (11, 12, 13)
    lookup.add(99)
    assert lookup.draft(3) == ((), 0)
    lookup.add(12)
    lookup.add(13)
    assert lookup.draft(2)[0] == (14, 15)


def test_only_the_latest_tokens_are_looked_at() -> None:
    far = PromptLookup([7, 8, 9, *range(100, 100 + MAX_LOOKED_UP_TOKENS), 7, 8])
    assert far.draft(1) == ((), 0)
