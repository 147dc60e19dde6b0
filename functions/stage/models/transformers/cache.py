"""The KV cache of transformers' modules: one cache object for each sequence, within one budget of bytes.

For draft tokens, the inputs of recurrent modules are kept, so that states can be updated again with only the accepted tokens.
"""

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from functions.stage.models.checkpoints import STATES_PER_SEQUENCE, Checkpoints, checkpoints_in
from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVLayout, KVNeed
from functions.stage.models.recurrent_states import RecurrentKV
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


class TransformersKVCache(RecurrentKV[States]):
    """Implements `KVBlocks` with one of transformers' cache objects for each sequence."""

    def __init__(
        self,
        budget_bytes: int,
        layers: Sequence[LayerMemory],
        recurrent_modules: Sequence[TokenByToken] = (),
        written_by: str = "",
    ) -> None:
        """Creates a cache without sequences.

        layers: all layers of the model, with measured sizes. recurrent_modules: those of this stage.
        written_by: names all else that the bits of KV depend on, as for `NativeKVPool`. Raises ValueError if the budget is less
        than one token takes.
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
        self._recurrent = {}
        self.checkpoints = Checkpoints(checkpoints)

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self._caches[handle] = SequenceCache(self._layers, tokens)
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        del self._caches[handle]

    @torch.inference_mode()
    def resize(self, handle: int, tokens: int) -> None:
        super().resize(handle, tokens)
        self.truncate(handle, tokens)
        for layer in self.cache(handle).own:
            if isinstance(layer, ReservedLayer):
                layer.resize(tokens)

    def cache(self, handle: int) -> SequenceCache:
        """Returns the cache object of a sequence, after setting the length of all layers to `filled(handle)` tokens.

        Lengths are set here and not in `truncate`, because a pass that failed half-way has extended only some of the layers.
        """
        cache = self._caches[handle]
        cache.go_to(self.filled(handle))
        return cache

    # Recurrent states.

    @torch.inference_mode()
    def _copied_states(self, handle: int) -> States:
        return tuple(state.clone() for layer in self._caches[handle].recurrent for state in layer.states)

    @torch.inference_mode()
    def _restore_states(self, handle: int, states: States | None) -> None:
        rest = iter(states or ())
        for layer, places in zip(self._caches[handle].recurrent, self._places, strict=True):
            if states is None:
                layer.begin()
            else:
                layer.restore(places, list(islice(rest, len(places))))

    @torch.inference_mode()
    def _repeat(self, handle: int, position: int, tokens: int) -> None:
        for module in self._modules:
            module.repeat(self._caches[handle], tokens)

    # A pass.

    def begin_pass(self, handle: int, tokens: int, draft_tokens: int) -> SequenceCache:
        """Prepares a sequence for a pass that adds `tokens`, and returns its cache object.

        The last `draft_tokens` of them may be rejected. The tokens count as held before they are computed: if the pass fails,
        layers with windows may already have dropped as many old tokens as after the pass. Call `end_pass` after the pass.
        """
        cache = self.cache(handle)
        if self.layout.state_bytes:
            cache.copied = {at: [] for at in self._begin_recurrent(handle, tokens, draft_tokens)}
            cache.drafts_from = cache.position + tokens - draft_tokens if draft_tokens else None
            cache.draft_inputs = {}
        self.extend(handle, tokens)
        return cache

    def end_pass(self, handle: int, draft_tokens: int) -> None:
        """Keeps the recurrent states that the pass has copied."""
        if self.layout.state_bytes:
            cache = self._caches[handle]
            self._end_recurrent(handle, draft_tokens, {at: tuple(states) for at, states in cache.copied.items()})
            cache.copied = {}

    # Copies.

    @torch.inference_mode()
    def _copy_kv(self, source: int, target: int, tokens: int) -> None:
        read, written = self.cache(source), self.cache(target)
        for layer, copied_layer in zip(read.own, written.own, strict=True):
            if isinstance(layer, ReservedLayer) and layer.tensors:
                copied_layer.put(layer.first, *(tensor[:, :, : tokens - layer.first] for tensor in layer.tensors))

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
        states = self._states_at(handle, tokens) if self.layout.state_bytes else None
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


def _tensor_of(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Converts bytes [tokens, bytes] to KV [1, heads, tokens, head size], with the dtype and device of `like`."""
    _, heads, _, size = like.shape
    return rows.contiguous().view(like.dtype).reshape(len(rows), heads, size).transpose(0, 1)[None].to(like.device)
