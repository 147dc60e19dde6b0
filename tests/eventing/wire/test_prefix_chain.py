"""Prefix chains: equal for equal beginnings, and different for other clients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES, chain_key, common_blocks, extended, packed, unpacked

KEY = chain_key("0" * 32, "")
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5 * BLOCK_TOKENS)


@given(token_ids, token_ids, token_ids)
def test_common_blocks_of_chains_are_common_blocks_of_tokens(prefix: list[int], one: list[int], other: list[int]) -> None:
    one, other = prefix + one, prefix + other
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_blocks(extended((), one, KEY), extended((), other, KEY)) == same // BLOCK_TOKENS


@given(token_ids, token_ids)
def test_a_chain_goes_on_from_its_beginning(first: list[int], more: list[int]) -> None:
    whole = extended((), first + more, KEY)
    assert extended(extended((), first, KEY), first + more, KEY) == whole
    assert len(whole) == len(first + more) // BLOCK_TOKENS
    assert unpacked(packed(whole)) == whole


@pytest.mark.parametrize("key", [chain_key("0" * 32, "somebody"), chain_key("1" * 32, "")])
def test_other_clients_and_pipelines_have_other_chains(key: bytes) -> None:
    tokens = list(range(BLOCK_TOKENS))
    (own,), (foreign,) = extended((), tokens, KEY), extended((), tokens, key)
    assert own != foreign
    assert len(own) == DIGEST_BYTES


def test_an_invalid_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes is not a multiple of 16"):
        ReserveRow("a", 0, 1, chain=bytes(17))
    with pytest.raises(ValueError, match="17 bytes"):
        ReleaseRow("a", 0, chain=bytes(17))
    with pytest.raises(ValueError, match="token_ids has 8 bytes, the chain covers 1 block"):
        ReserveRow("a", 0, 17, chain=bytes(16), token_ids=bytes(8))
