"""Sequences that begin alike and come together: the first computes what they share, the others wait for it and find it held.

They have their memory and their place in a micro-batch meanwhile. When the shared tokens are computed at every stage, the
others ask for their reservation again, whose reply then says so. Who has followed in vain goes alone.
"""

from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS, common_blocks
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.sequence import Followed, Sequence

LEAST_SHARED_TOKENS: Final = 64
"""Fewer are computed sooner than found."""


def follow(sequence: Sequence, board: Board) -> None:
    """`sequence` has memory and nothing is sent yet: it waits for one on the same route that computes most of what it lacks."""
    held = sequence.progress.held_everywhere
    if sequence.goes_alone or sequence.strikes.count or not sequence.at_rest or sequence.over:
        return
    shared = [(_shared(sequence, other), other) for other in _computing(sequence, board)]
    tokens, other = max(shared, key=lambda each: each[0], default=(0, None))
    if other is not None and tokens - held >= LEAST_SHARED_TOKENS:
        sequence.follows = Followed(other, tokens)


def asks_again(sequence: Sequence, board: Board) -> bool:
    """What it waited for is there, or will not come."""
    if not sequence.at_rest or sequence.must_restart or sequence.over:
        return False
    return sequence.follows is not None and _is_over(sequence, sequence.follows, board)


def _computing(sequence: Sequence, board: Board) -> list[Sequence]:
    """Who is on the same route and follows nobody."""
    assert sequence.route is not None
    instances = sequence.route.instances
    return [
        other
        for batch in board.micro_batches
        if batch.route.instances == instances
        for other in batch.sequences
        if other is not sequence and _computes(other)
    ]


def _computes(other: Sequence) -> bool:
    return other.reserved and other.follows is None and not (other.over or other.must_restart or other.strikes.count)


def _shared(sequence: Sequence, other: Sequence) -> int:
    return BLOCK_TOKENS * common_blocks(sequence.asked, other.asked)


def _is_over(sequence: Sequence, followed: Followed, board: Board) -> bool:
    other = followed.sequence
    if other.id not in board.sequences or not _computes(other) or other.route is None or sequence.route is None:
        return True
    return other.route.instances != sequence.route.instances or other.progress.held_everywhere >= followed.tokens
