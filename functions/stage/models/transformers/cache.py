"""The KV cache of transformers' modules: one cache object for each sequence, under one budget of bytes.

A sequence's recurrent states cannot be truncated. It goes back to the last checkpoint, or to the last token before draft
tokens: the states there and the inputs of the recurrent modules since then are kept until the next pass, to update the states
again by the draft tokens that were accepted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from functions.stage.models.checkpoints import BLOCK_TOKENS, STATES_PER_SEQUENCE, Checkpoints, checkpoints_in
from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVBlocks, KVLayout, KVNeed
from functions.stage.models.transformers.cache_layers import (
    GOING_BACK,
    LayerMemory,
    ReservedLayer,
    SequenceCache,
    States,
    TokenByToken,
    WindowLayer,
    kept_tokens,
)


@dataclass(slots=True)
class _Recurrent:
    """Which states of a sequence can be had."""

    at: int | None = 0  # its layers have the states after so many tokens; None: a pass that failed has left them anyhow
    before_drafts: tuple[int, States] | None = None  # tokens before the last pass's draft tokens, and the states there
    drafts: int = 0
    among_drafts: dict[int, States] = field(default_factory=dict)  # checkpoints, if these tokens are accepted


class TransformersKVCache(KVBlocks):
    """Implements `KVBlocks` with one of transformers' cache objects for each sequence."""

    def __init__(
        self,
        budget_bytes: int,
        layers: Sequence[LayerMemory],
        recurrent_modules: Sequence[TokenByToken] = (),
        written_by: str = "",
    ) -> None:
        """layers: of the whole model, measured. written_by: all else that the bits of KV depend on, as for `NativeKVPool`.

        Raises ValueError if the budget is less than one token takes.
        """
        self._own = [layer for layer in layers if layer.is_own]
        full = [layer.kv_bytes for layer in self._own if layer.has_kv and layer.window is None]
        windowed = [layer.kv_bytes for layer in self._own if layer.window is not None]
        self._places = [layer.places for layer in self._own if layer.number_of_states]
        self._examples = [state for layer in self._own for state in layer.states]
        state_bytes = sum(state.nbytes for state in self._examples)
        self.window = max((layer.window or 0 for layer in self._own), default=0)
        checkpoints = checkpoints_in(budget_bytes, state_bytes)
        need = KVNeed(sum(full), sum(windowed), kept_tokens(self.window), fixed_units=STATES_PER_SEQUENCE * state_bytes)
        super().__init__(budget_bytes - checkpoints * state_bytes, need, GOING_BACK)
        if self.capacity_tokens < 1:
            raise ValueError(f"a KV budget of {budget_bytes} bytes holds no token, which takes {need.of(1)} bytes: raise it")
        unit = math.gcd(*full, *windowed)  # so that layers of different sizes are as many layers of one size
        self.layout = KVLayout(
            f"transformers {written_by}",
            sum(full) // max(1, unit),
            1,
            unit // 2,
            windowed_layers=sum(windowed) // max(1, unit),
            window=self.window,
            state_bytes=state_bytes,
        )
        self._layers = tuple(layers)
        self._modules = tuple(recurrent_modules)
        self._caches: dict[int, SequenceCache] = {}
        self._recurrent: dict[int, _Recurrent] = {}
        self._checkpoints: Checkpoints[States] = Checkpoints(checkpoints)

    @property
    def checkpoint_bytes(self) -> int:
        return len(self._checkpoints) * self.layout.state_bytes

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self._caches[handle] = SequenceCache(self._layers, tokens)
        self._recurrent[handle] = _Recurrent()
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        self._checkpoints.release(handle)
        del self._caches[handle], self._recurrent[handle]

    @torch.inference_mode()
    def resize(self, handle: int, tokens: int) -> None:
        super().resize(handle, tokens)
        self.truncate(handle, tokens)
        for layer in self.cache(handle).own:
            if isinstance(layer, ReservedLayer):
                layer.resize(tokens)

    def cache(self, handle: int) -> SequenceCache:
        """The cache object of a sequence. All its layers hold `filled(handle)` tokens.

        Lengths are set here and not in `truncate`, because a pass that failed half-way has extended some layers only.
        """
        cache = self._caches[handle]
        cache.go_to(self.filled(handle))
        return cache

    # What a sequence holds.

    def length(self, handle: int) -> int:
        held = super().length(handle)
        if held and self.layout.state_bytes:  # less while KV is being restored whose states have not come yet
            at = self._recurrent[handle].at or 0
            return at if super().holds(handle, at) else 0
        return held

    def holds(self, handle: int, tokens: int) -> bool:
        return super().holds(handle, tokens) and (not self.layout.state_bytes or self._states(handle, tokens) is not None)

    def last_held(self, handle: int, tokens: int) -> int:
        if not self.layout.state_bytes:
            return super().last_held(handle, tokens)
        recurrent, tokens = self._recurrent[handle], min(tokens, self.filled(handle))
        at = self._checkpoints.last(handle, tokens)
        if recurrent.at is not None and recurrent.at <= tokens:
            at = max(at, recurrent.at)
        if recurrent.before_drafts is not None and recurrent.before_drafts[0] <= tokens:
            at = max(at, min(tokens, recurrent.before_drafts[0] + recurrent.drafts))
        return at if KVBlocks.holds(self, handle, at) else 0

    @torch.inference_mode()
    def truncate(self, handle: int, length: int) -> None:
        """See `KVCache`. With recurrent layers it goes back to the last position up to `length` whose states can be had."""
        if not self.layout.state_bytes:
            super().truncate(handle, length)
            return
        at = self.last_held(handle, length)
        super().truncate(handle, at)
        self._checkpoints.truncate(handle, at)
        recurrent, cache = self._recurrent[handle], self._caches[handle]
        before = recurrent.before_drafts
        if recurrent.at == at:
            return
        if at == 0:
            for layer in cache.recurrent:
                layer.begin()
        elif (states := self._states(handle, at)) is not None:
            self._restore(cache, states)
        elif before is not None:
            self._restore(cache, before[1])
            for module in self._modules:
                module.repeat(cache, at - before[0])
        recurrent.at = at
        recurrent.before_drafts = before if before is not None and before[0] <= at else None
        recurrent.drafts = 0 if recurrent.before_drafts is None else at - recurrent.before_drafts[0]
        recurrent.among_drafts = {of: states for of, states in recurrent.among_drafts.items() if of <= at}

    def _states(self, handle: int, tokens: int) -> States | None:
        """Copies of the states after `tokens`; None if they are not kept."""
        recurrent = self._recurrent[handle]
        if (states := self._checkpoints.get(handle, tokens) or recurrent.among_drafts.get(tokens)) is not None:
            return states
        if recurrent.at == tokens:
            return tuple(state.clone() for layer in self._caches[handle].recurrent for state in layer.states)
        if recurrent.before_drafts is not None and recurrent.before_drafts[0] == tokens:
            return recurrent.before_drafts[1]
        return None

    # A pass.

    def begin_pass(self, handle: int, tokens: int, draft_tokens: int) -> SequenceCache:
        """Counts `tokens` more, of which the last `draft_tokens` may be rejected, and returns the cache object for them.

        Counted before they are computed: if that fails, layers with windows may have dropped tokens of a sequence that is as
        long as after it. Call `end_pass` after them.
        """
        cache = self.cache(handle)
        first = cache.position
        if self.layout.state_bytes:
            recurrent = self._recurrent[handle]
            self._accept(recurrent, handle, first)
            recurrent.at = None
            end = first + tokens
            copied = self._checkpoints.positions(handle, first, end)
            cache.drafts_from = end - draft_tokens if draft_tokens else None
            cache.draft_inputs = {}
            cache.copied = {at: [] for at in copied}
            if cache.drafts_from == first:
                cache.copied[first] = [state.clone() for layer in cache.recurrent for state in layer.states]
            elif cache.drafts_from is not None:
                cache.copied[cache.drafts_from] = []
        self.extend(handle, tokens)
        return cache

    def end_pass(self, handle: int) -> None:
        """Keeps the recurrent states that the pass has copied."""
        if not self.layout.state_bytes:
            return
        recurrent, cache = self._recurrent[handle], self._caches[handle]
        end = recurrent.at = self.filled(handle)
        copied = {at: tuple(states) for at, states in cache.copied.items()}
        cache.copied = {}
        certain = end if cache.drafts_from is None else cache.drafts_from
        if certain < end:
            recurrent.before_drafts, recurrent.drafts = (certain, copied[certain]), end - certain
        for at in self._checkpoints.positions(handle, 0, end).intersection(copied):
            if at <= certain:
                self._checkpoints.put(handle, at, copied[at])
            else:
                recurrent.among_drafts[at] = copied[at]

    def _accept(self, recurrent: _Recurrent, handle: int, tokens: int) -> None:
        """Ends the time in which draft tokens can be rejected. Keeps their checkpoints up to `tokens`."""
        for at, state in recurrent.among_drafts.items():
            if at <= tokens:
                self._checkpoints.put(handle, at, state)
        recurrent.among_drafts = {}
        recurrent.before_drafts, recurrent.drafts = None, 0

    def keep_checkpoint(self, handle: int, tokens: int) -> None:
        if self.layout.state_bytes:
            self._checkpoints.ask(handle, tokens)

    def checkpoints(self, handle: int) -> tuple[int, ...]:
        return self._checkpoints.of(handle)

    # Copies.

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        self.truncate(target, 0)
        read, written = self.cache(source), self.cache(target)
        for layer, copied_layer in zip(read.own, written.own, strict=True):
            if isinstance(layer, ReservedLayer) and layer.tensors:
                copied_layer.put(layer.first, *(tensor[:, :, : tokens - layer.first] for tensor in layer.tensors))
        copied = self._reservations[target]
        copied.filled, copied.least = tokens, self._reservations[source].least
        if self.layout.state_bytes:
            states = self._states(source, tokens)
            assert states is not None
            self._continue(target, tokens, states)

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        if not target.size:
            return
        tokens, rows = target.shape[3], []
        for layer in self._layers_with_kv(handle, windowed):
            held = slice(first - layer.first, first - layer.first + tokens)
            rows += [tensor[0, :, held].transpose(0, 1).reshape(tokens, -1) for tensor in layer.tensors]
        numbers = torch.cat([row.contiguous().view(torch.uint8) for row in rows], dim=1).cpu().numpy()
        target[...] = numbers.reshape(tokens, *target.shape[:3], -1).transpose(1, 2, 3, 0, 4)

    @torch.inference_mode()
    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        if not source.size:
            return
        rows = torch.from_numpy(np.ascontiguousarray(source.transpose(3, 0, 1, 2, 4)).reshape(source.shape[3], -1))
        examples = [layer.kv for layer in self._own if layer.has_kv and (layer.window is not None) == windowed]
        parts = iter(torch.split(rows, [example.nbytes for kv in examples for example in kv], dim=1))
        for layer, kv in zip(self._layers_with_kv(handle, windowed), examples, strict=True):
            layer.put(first, *(_tensor_of(next(parts), example) for example in kv))

    def state_out(self, handle: int, tokens: int) -> bytes:
        states = self._states(handle, tokens) if self.layout.state_bytes else None
        return b"".join(state.reshape(-1).view(torch.uint8).cpu().numpy().tobytes() for state in states or ())

    @torch.inference_mode()
    def state_in(self, handle: int, tokens: int, data: memoryview) -> None:
        numbers = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        parts = torch.split(numbers, [example.nbytes for example in self._examples])
        states = [
            part.view(like.dtype).reshape(like.shape).to(like.device) for part, like in zip(parts, self._examples, strict=True)
        ]
        self._continue(handle, tokens, tuple(states))

    def _layers_with_kv(self, handle: int, windowed: bool) -> list[ReservedLayer]:
        own = self.cache(handle).own
        return [layer for layer in own if isinstance(layer, ReservedLayer) and isinstance(layer, WindowLayer) == windowed]

    def _continue(self, handle: int, tokens: int, states: States) -> None:
        """Makes these the states after the first `tokens` of a sequence."""
        self._restore(self._caches[handle], states)
        self._recurrent[handle] = _Recurrent(at=tokens)
        if tokens % BLOCK_TOKENS == 0:
            self._checkpoints.put(handle, tokens, states)

    def _restore(self, cache: SequenceCache, states: States) -> None:
        rest = iter(states)
        for layer, places in zip(cache.recurrent, self._places, strict=True):
            layer.restore(places, list(islice(rest, len(places))))


def _tensor_of(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes [tokens, bytes] as KV [1, heads, tokens, head size]."""
    _, heads, _, size = like.shape
    return rows.contiguous().view(like.dtype).reshape(len(rows), heads, size).transpose(0, 1)[None].to(like.device)
