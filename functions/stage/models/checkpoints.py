"""Checkpoints: copies of a sequence's recurrent states, so that the sequence can go back to an earlier position.

The recurrent state of a layer covers all tokens so far, and no token can be taken out of it. To go back to an earlier position,
a sequence restores the last checkpoint before that position, and computes the tokens after the checkpoint again. A checkpoint
takes as much memory as the state, often as much as the KV of thousands of tokens. So checkpoints are kept only at positions
from which sequences are likely to continue:

    the end of the last whole block of each sequence, where its next turn begins; a later one replaces it
    the end of a prompt, and the end of a prefix that two sequences share: the prefix cache asks for these
    every SPACING_TOKENS

All sequences share one budget. If it is exceeded, the least recently used checkpoint is dropped.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

SPACING_TOKENS: Final = 512
STATES_PER_SEQUENCE: Final = 2  # after its last token, and before draft tokens: the memory that a reservation includes
_SHARE: Final = 4  # one in so many bytes of the stage's memory for sequences is for checkpoints
BLOCK_TOKENS: Final = 16  # as many as in a block of a prefix chain

State = TypeVar("State")


def checkpoints_in(budget_bytes: int, state_bytes: int) -> int:
    """Returns how many checkpoints a stage may keep. budget_bytes: all memory for sequences.

    state_bytes: size of the recurrent states of one sequence; 0 if no layer is recurrent.
    """
    return budget_bytes // _SHARE // state_bytes if state_bytes else 0


@dataclass(slots=True)
class _Checkpoint(Generic[State]):
    state: State
    moves_on: bool  # it is here only as the last whole block so far: the next one replaces it


class Checkpoints(Generic[State]):
    """Keeps recurrent states by sequence and position, within a budget. Never reads or changes a state."""

    def __init__(self, most: int) -> None:
        """Creates an empty collection of at most `most` states, of all sequences together."""
        self._most = most
        self._kept: dict[tuple[int, int], _Checkpoint[State]] = {}  # by handle and tokens, least recently used first
        self._positions: dict[int, set[int]] = {}  # handle → tokens of its checkpoints
        self._asked: dict[int, set[int]] = {}  # handle → tokens

    def __len__(self) -> int:
        return len(self._kept)

    def ask(self, handle: int, tokens: int) -> None:
        """Asks for a checkpoint after `tokens` of the sequence. If it exists already, it will not be replaced by later blocks.

        Does nothing if no checkpoints are kept, as in a model without recurrent layers.
        """
        if not self._most:
            return
        self._asked.setdefault(handle, set()).add(tokens)
        if (handle, tokens) in self._kept:
            self._kept[handle, tokens].moves_on = False

    def positions(self, handle: int, first: int, end: int) -> set[int]:
        """Returns the positions in (first, end], in tokens, at which the sequence should have checkpoints."""
        if not self._most:
            return set()
        spaced = range(first // SPACING_TOKENS * SPACING_TOKENS + SPACING_TOKENS, end + 1, SPACING_TOKENS)
        asked = (tokens for tokens in self._asked.get(handle, ()) if first < tokens <= end)
        last_block = end // BLOCK_TOKENS * BLOCK_TOKENS
        return {*spaced, *asked, *((last_block,) if last_block > first else ())}

    def put(self, handle: int, tokens: int, state: State) -> None:
        """Adds a checkpoint after `tokens` of the sequence.

        Drops the earlier checkpoint of the sequence's last whole block, and checkpoints that exceed the budget.
        """
        moves_on = tokens % SPACING_TOKENS > 0 and tokens not in self._asked.get(handle, ())
        self._drop(handle, [at for at in self.of(handle) if at == tokens or (at < tokens and self._kept[handle, at].moves_on)])
        self._kept[handle, tokens] = _Checkpoint(state, moves_on)
        self._positions.setdefault(handle, set()).add(tokens)
        while len(self._kept) > self._most:
            of, at = next(iter(self._kept))
            self._drop(of, [at])

    def get(self, handle: int, tokens: int) -> State | None:
        """Returns the state after `tokens` of the sequence. None if there is no such checkpoint."""
        found = self._kept.pop((handle, tokens), None)
        if found is None:
            return None
        self._kept[handle, tokens] = found  # as the most recently used
        return found.state

    def last(self, handle: int, tokens: int) -> int:
        """Returns the position of the last checkpoint up to `tokens`. 0 if there is none: the beginning of the sequence."""
        return max((at for at in self.of(handle) if at <= tokens), default=0)

    def truncate(self, handle: int, tokens: int) -> None:
        """Drops the checkpoints of the sequence after position `tokens`, because other tokens may follow."""
        self._drop(handle, [at for at in self.of(handle) if at > tokens])

    def release(self, handle: int) -> None:
        """Drops all checkpoints of the sequence and all that were asked for."""
        self._drop(handle, self.of(handle))
        self._asked.pop(handle, None)

    def of(self, handle: int) -> tuple[int, ...]:
        """Returns the positions of the sequence's checkpoints, in tokens and in no particular order."""
        return tuple(self._positions.get(handle, ()))

    def _drop(self, handle: int, positions: Iterable[int]) -> None:
        for tokens in positions:
            del self._kept[handle, tokens]
            self._positions[handle].remove(tokens)
