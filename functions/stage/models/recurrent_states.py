"""Keeps track of the recurrent states to which each sequence can go back.

Recurrent states cannot be truncated. A sequence goes back to its last checkpoint, or to the last token before the draft tokens
of the last pass. For the latter, the states before the draft tokens are kept until the next pass, with the data by which the
draft tokens changed the states. So the states can be updated again with only the accepted draft tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from functions.stage.models.checkpoints import BLOCK_TOKENS, Checkpoints
from functions.stage.models.kv_cache import KVBlocks

State = TypeVar("State")


@dataclass(slots=True)
class _Recurrent(Generic[State]):
    """The states of one sequence that are available besides checkpoints."""

    at: int | None = 0  # the layers have the states after this many tokens; None: undefined, as a pass has begun or failed
    before_drafts: tuple[int, State] | None = None  # tokens before the last pass's draft tokens, and the states there
    drafts: int = 0
    among_drafts: dict[int, State] = field(default_factory=dict)  # checkpoints, if these tokens are accepted


class RecurrentKV(KVBlocks, Generic[State]):
    """Implements `KVBlocks` for sequences with recurrent states. Subclasses own the states after the last token.

    State: type of a copy of a sequence's states in all layers; copies are never changed. If `layout.state_bytes` is 0, no layer
    is recurrent and the class does the same as `KVBlocks`.
    """

    checkpoints: Checkpoints[State]
    _recurrent: dict[int, _Recurrent[State]]

    # Subclasses implement these.

    def _copied_states(self, handle: int) -> State:
        """Returns a copy of the present states of the sequence."""
        raise NotImplementedError

    def _restore_states(self, handle: int, states: State | None) -> None:
        """Sets the states of the sequence to a copy of `states`. If None, to the states before the first token."""
        raise NotImplementedError

    def _repeat(self, handle: int, position: int, tokens: int) -> None:
        """Updates the states of the sequence with the first `tokens` draft tokens of its last pass.

        The states must be those after `position` tokens.
        """
        raise NotImplementedError

    # KVBlocks.

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self._recurrent[handle] = _Recurrent()
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        self.checkpoints.release(handle)
        del self._recurrent[handle]

    def length(self, handle: int) -> int:
        held = super().length(handle)
        if held and self.layout.state_bytes:  # less while KV is being restored whose states have not come yet
            at = self._recurrent[handle].at or 0
            return at if super().holds(handle, at) else 0
        return held

    def holds(self, handle: int, tokens: int) -> bool:
        return super().holds(handle, tokens) and (not self.layout.state_bytes or self._states_at(handle, tokens) is not None)

    def last_held(self, handle: int, tokens: int) -> int:
        if not self.layout.state_bytes:
            return super().last_held(handle, tokens)
        recurrent, tokens = self._recurrent[handle], min(tokens, self.filled(handle))
        at = self.checkpoints.last(handle, tokens)
        if recurrent.at is not None and recurrent.at <= tokens:
            at = max(at, recurrent.at)
        if recurrent.before_drafts is not None and recurrent.before_drafts[0] <= tokens:
            at = max(at, min(tokens, recurrent.before_drafts[0] + recurrent.drafts))
        return at if KVBlocks.holds(self, handle, at) else 0

    def truncate(self, handle: int, length: int) -> None:
        """See `KVBudget`. With recurrent layers, goes back to the last position up to `length` whose states are available."""
        if not self.layout.state_bytes:
            super().truncate(handle, length)
            return
        at = self.last_held(handle, length)
        super().truncate(handle, at)
        self.checkpoints.truncate(handle, at)
        recurrent = self._recurrent[handle]
        before = recurrent.before_drafts
        if recurrent.at == at:
            return
        if at == 0:
            self._restore_states(handle, None)
        elif (states := self._states_at(handle, at)) is not None:
            self._restore_states(handle, states)
        elif before is not None:
            self._restore_states(handle, before[1])
            self._repeat(handle, before[0], at - before[0])
        recurrent.at = at
        recurrent.before_drafts = before if before is not None and before[0] <= at else None
        recurrent.drafts = 0 if recurrent.before_drafts is None else at - recurrent.before_drafts[0]
        recurrent.among_drafts = {of: states for of, states in recurrent.among_drafts.items() if of <= at}

    def copy(self, source: int, target: int, tokens: int) -> None:
        super().copy(source, target, tokens)
        if self.layout.state_bytes:
            states = self._states_at(source, tokens)
            assert states is not None
            self._continue(target, tokens, states)

    def _states_at(self, handle: int, tokens: int) -> State | None:
        """Returns a copy of the states after `tokens`. None if they are not kept."""
        recurrent = self._recurrent[handle]
        if (states := self.checkpoints.get(handle, tokens)) is not None:
            return states
        if (states := recurrent.among_drafts.get(tokens)) is not None:
            return states
        if recurrent.at == tokens:
            return self._copied_states(handle)
        if recurrent.before_drafts is not None and recurrent.before_drafts[0] == tokens:
            return recurrent.before_drafts[1]
        return None

    def _continue(self, handle: int, tokens: int, states: State) -> None:
        """Sets the states of a sequence to `states`, which are those after the first `tokens`."""
        self._restore_states(handle, states)
        self._recurrent[handle] = _Recurrent(at=tokens)
        if tokens % BLOCK_TOKENS == 0:
            self.checkpoints.put(handle, tokens, states)

    # A pass.

    def _begin_recurrent(self, handle: int, tokens: int, draft_tokens: int) -> set[int]:
        """Prepares a sequence for a pass that adds `tokens`, of which the last `draft_tokens` may be rejected.

        Returns the positions in the sequence, in tokens, at which the pass must copy the states. Call `_end_recurrent` with the
        copies after the pass.
        """
        recurrent, first = self._recurrent[handle], self.filled(handle)
        for at, state in recurrent.among_drafts.items():
            if at <= first:
                self.checkpoints.put(handle, at, state)
        self._recurrent[handle] = _Recurrent(at=None)
        copied = self.checkpoints.positions(handle, first, first + tokens)
        if draft_tokens:
            certain = first + tokens - draft_tokens
            if certain == first:
                self._recurrent[handle].before_drafts = first, self._copied_states(handle)
            else:
                copied.add(certain)
        return copied

    def _end_recurrent(self, handle: int, draft_tokens: int, copied: Mapping[int, State]) -> None:
        """Keeps the states of a pass that has ended. copied: the states that the pass has copied, by position in tokens."""
        recurrent, end = self._recurrent[handle], self.filled(handle)
        recurrent.at, recurrent.drafts, certain = end, draft_tokens, end - draft_tokens
        if draft_tokens and recurrent.before_drafts is None:
            recurrent.before_drafts = certain, copied[certain]
        for at in self.checkpoints.positions(handle, 0, end).intersection(copied):
            if at <= certain:
                self.checkpoints.put(handle, at, copied[at])
            else:
                recurrent.among_drafts[at] = copied[at]
