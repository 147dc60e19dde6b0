"""Checkpoints: recurrent states that are kept of a sequence, so that it can go back to them.

A recurrent state of a layer covers all tokens so far, and no token can be taken out of it. Going back to an earlier position
means to restore the last checkpoint before it, and to compute the tokens after that again. A checkpoint takes as much memory as
the state itself, often that of thousands of tokens' KV. So they are kept only at the positions from which sequences go on:

    the last whole block of each sequence, which moves on with it: the end of a turn
    the end of a prompt, and the end of a prefix that two sequences have in common, as the prefix cache asks for them
    every SPACING_TOKENS

All sequences share one budget. Beyond it the checkpoint that was not used for the longest time is dropped.
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
    """How many checkpoints a stage keeps. budget_bytes: of all its memory for sequences. state_bytes: 0: not recurrent."""
    return budget_bytes // _SHARE // state_bytes if state_bytes else 0


@dataclass(slots=True)
class _Checkpoint(Generic[State]):
    state: State
    moves_on: bool  # it is only the last whole block so far: the next one replaces it


class Checkpoints(Generic[State]):
    """Keeps states by sequence and position, within a budget. It never changes or looks into a state."""

    def __init__(self, most: int) -> None:
        """most: states that are kept, of all sequences together."""
        self._most = most
        self._kept: dict[tuple[int, int], _Checkpoint[State]] = {}  # by handle and tokens, least recently used first
        self._positions: dict[int, set[int]] = {}  # handle → tokens of its checkpoints
        self._asked: dict[int, set[int]] = {}  # handle → tokens

    def __len__(self) -> int:
        return len(self._kept)

    def ask(self, handle: int, tokens: int) -> None:
        """Asks for a checkpoint after `tokens` of the sequence, which stays if it is there already.

        Does nothing if none is kept, as without recurrent layers.
        """
        if not self._most:
            return
        self._asked.setdefault(handle, set()).add(tokens)
        if (handle, tokens) in self._kept:
            self._kept[handle, tokens].moves_on = False

    def positions(self, handle: int, first: int, end: int) -> set[int]:
        """After which tokens in (first, end] the sequence is to have checkpoints."""
        if not self._most:
            return set()
        spaced = range(first // SPACING_TOKENS * SPACING_TOKENS + SPACING_TOKENS, end + 1, SPACING_TOKENS)
        asked = (tokens for tokens in self._asked.get(handle, ()) if first < tokens <= end)
        last_block = end // BLOCK_TOKENS * BLOCK_TOKENS
        return {*spaced, *asked, *((last_block,) if last_block > first else ())}

    def put(self, handle: int, tokens: int, state: State) -> None:
        """Keeps a state after `tokens` of the sequence.

        Drops the sequence's last whole block before it, and checkpoints beyond the budget.
        """
        moves_on = tokens % SPACING_TOKENS > 0 and tokens not in self._asked.get(handle, ())
        self._drop(handle, [at for at in self.of(handle) if at == tokens or (at < tokens and self._kept[handle, at].moves_on)])
        self._kept[handle, tokens] = _Checkpoint(state, moves_on)
        self._positions.setdefault(handle, set()).add(tokens)
        while len(self._kept) > self._most:
            of, at = next(iter(self._kept))
            self._drop(of, [at])

    def get(self, handle: int, tokens: int) -> State | None:
        """The state after `tokens` of the sequence; None if it is not kept."""
        found = self._kept.pop((handle, tokens), None)
        if found is None:
            return None
        self._kept[handle, tokens] = found  # as the most recently used
        return found.state

    def last(self, handle: int, tokens: int) -> int:
        """The last checkpoint that is not beyond `tokens`; 0, where every sequence begins, if there is none."""
        return max((at for at in self.of(handle) if at <= tokens), default=0)

    def truncate(self, handle: int, tokens: int) -> None:
        """Drops the sequence's checkpoints beyond `tokens`: other tokens may follow."""
        self._drop(handle, [at for at in self.of(handle) if at > tokens])

    def release(self, handle: int) -> None:
        """Drops all that is kept and asked for of the sequence."""
        self._drop(handle, self.of(handle))
        self._asked.pop(handle, None)

    def of(self, handle: int) -> tuple[int, ...]:
        """After how many tokens of the sequence there are checkpoints, in no particular order."""
        return tuple(self._positions.get(handle, ()))

    def _drop(self, handle: int, positions: Iterable[int]) -> None:
        for tokens in positions:
            del self._kept[handle, tokens]
            self._positions[handle].remove(tokens)
