"""The layers of transformers' cache objects: the KV or the recurrent states of one layer and one sequence.

All KV memory that a sequence has reserved is allocated at its first token, so that later steps allocate nothing. Layers with a
sliding window keep the window and at least GOING_BACK tokens before it, so that a sequence can be truncated by GOING_BACK
tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from storage.checkpoints.decoder_families import UnsupportedConfig

GOING_BACK: Final = 128
_SPARE: Final = 128  # further tokens: a layer drops old tokens only once for this many new ones

# The classes of transformers' cache layers for which `LayerMemory.layer` has a counterpart.
_KINDS: Final = (
    DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)  # fmt: skip

States = tuple[torch.Tensor, ...]
"""Copies of a sequence's recurrent states in all layers. They are never changed."""


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """KV of one layer and one sequence: [1, heads, reserved tokens, head size], of which the first `length` are held."""

    first = 0  # the first token that is held

    def __init__(self, reserved_tokens: int) -> None:
        super().__init__()
        self.reserved_tokens = reserved_tokens
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_size = like.shape
        return like.new_empty(batch, heads, self.reserved_tokens, head_size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.put(self.length, key_states, value_states)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that hold tokens, each [1, heads, tokens, size]. Empty before the first token."""
        return [self.keys, self.values] if self.is_initialized else []

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes the KV of tokens from `first` on. These become the last tokens of the layer.

        keys, values: [1, heads, tokens, head size].
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.length = first + keys.shape[-2]
        self.keys[:, :, first : self.length] = keys
        self.values[:, :, first : self.length] = values

    def get_seq_length(self) -> int:
        return self.length

    def resize(self, tokens: int) -> None:
        """Changes the reservation to `tokens`. Keeps the KV that still fits."""
        self.reserved_tokens = tokens
        if self.is_initialized:
            keys, values, held = self.keys, self.values, min(self.length - self.first, tokens)
            self.keys, self.values = self._allocate(keys), self._allocate(values)
            self.keys[:, :, :held] = keys[:, :, :held]
            self.values[:, :, :held] = values[:, :, :held]


class WindowLayer(ReservedLayer):
    """KV of one layer with a sliding window: the tokens from `first` on."""

    is_sliding = True

    def __init__(self, reserved_tokens: int, window: int) -> None:
        """Creates an empty layer. window: how many tokens a token attends to, itself included."""
        super().__init__(min(reserved_tokens, kept_tokens(window)))
        self.window = window
        self.first = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._append(key_states, value_states)
        seen = self.window - 1 + key_states.shape[-2]
        return keys[:, :, -seen:], values[:, :, -seen:]

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if first != self.length:
            self.first = self.length = first
        self._append(keys, values)

    def _append(self, new_keys: torch.Tensor, new_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens. If there is too little memory, drops old tokens. Returns the KV of old and new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(new_keys, new_values)
        held, rows = self.length - self.first, new_keys.shape[-2]
        end = held + rows
        if end <= self.reserved_tokens:
            self.keys[:, :, held:end] = new_keys
            self.values[:, :, held:end] = new_values
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        else:
            keys = torch.cat((self.keys[:, :, :held], new_keys), -2)
            values = torch.cat((self.values[:, :, :held], new_values), -2)
            kept = min(end, self.window + GOING_BACK)
            self.keys[:, :, :kept] = keys[:, :, -kept:]
            self.values[:, :, :kept] = values[:, :, -kept:]
            self.first += end - kept
        self.length += rows
        return keys, values

    def resize(self, tokens: int) -> None:
        super().resize(min(tokens, kept_tokens(self.window)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = min(self.length, self.window - 1)
        return before + query_length, self.length - before


class IndexedLayer(ReservedLayer):
    """KV of one layer with sparse attention, and the keys [1, 1, tokens, size] with which its indexer chooses tokens."""

    indexer_keys: torch.Tensor | None = None
    position = 0  # tokens before those of the present pass

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, *([] if self.indexer_keys is None else [self.indexer_keys])]

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Adds the indexer keys of new tokens [1, tokens, size], and returns those of all tokens.

        The modules call it before or after `update`.
        """
        if self.indexer_keys is None:
            self.indexer_keys = self._allocate(indexer_key_states[:, None])
        end = self.position + indexer_key_states.shape[1]
        self.indexer_keys[:, 0, self.position : end] = indexer_key_states
        return self.indexer_keys[:, 0, :end]

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor, *indexer_keys: torch.Tensor) -> None:
        super().put(first, keys, values)
        for new in indexer_keys:
            if self.indexer_keys is None:
                self.indexer_keys = self._allocate(new)
            self.indexer_keys[:, :, first : self.length] = new

    def resize(self, tokens: int) -> None:
        super().resize(tokens)
        if (old := self.indexer_keys) is not None:
            held = min(self.length, tokens)
            self.indexer_keys = self._allocate(old)
            self.indexer_keys[:, :, :held] = old[:, :, :held]


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """Recurrent states of one layer and one sequence, such as the tail of a convolution and the matrix of a delta rule."""

    has_previous_state: dict[int, bool]

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        # transformers' own imports the compiler, to mark addresses for CUDA graphs.
        if conv_states is not None:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self._set(
                "conv", state_idx, conv_states.new_zeros(*conv_states.shape[:-1], conv_kernel_size or conv_states.shape[-1])
            )
        if recurrent_states is not None:
            self._set("recurrent", state_idx, torch.zeros_like(recurrent_states))

    def begin(self) -> None:
        """Forgets all tokens. The next token begins with states of zeros."""
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)

    @property
    def places(self) -> list[tuple[str, int]]:
        """Kind and index of each state of the layer, in the order of `states`. Known after the first token."""
        convolutions = [("conv", index) for index, state in self.conv_states.items() if state is not None]
        return convolutions + [("recurrent", index) for index, state in self.recurrent_states.items() if state is not None]

    @property
    def states(self) -> list[torch.Tensor]:
        """The states themselves, not copies. The next token changes them."""
        return [getattr(self, f"{kind}_states")[index] for kind, index in self.places]

    def restore(self, places: Sequence[tuple[str, int]], states: Sequence[torch.Tensor]) -> None:
        """Sets the states of the layer to copies of `states`. places: kind and index of each, as in `places`."""
        for (kind, index), state in zip(places, states, strict=True):
            self.dtype, self.device = state.dtype, state.device
            self._set(kind, index, state.clone())
            self.has_previous_state[index] = True

    def _set(self, kind: str, index: int, state: torch.Tensor) -> None:
        getattr(self, f"{kind}_states")[index] = state
        getattr(self, f"is_{kind}_states_initialized")[index] = True
        if kind == "conv":
            self.conv_kernel_size[index] = state.shape[-1]


class StateAndReservedLayer(StateLayer, ReservedLayer):
    """KV and recurrent states of a layer that has attention and a recurrent mixer side by side."""

    is_compileable = False

    def __init__(self, reserved_tokens: int, number_of_states: int) -> None:
        ReservedLayer.__init__(self, reserved_tokens)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *kv: Any, **state: Any) -> None:
        """Allocates either KV or states. transformers passes keys and values by position, and states by name."""
        if kv:
            ReservedLayer.lazy_initialization(self, *kv)
        else:
            StateLayer.lazy_initialization(self, **state)


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer keeps of a sequence."""

    is_own: bool = True  # whether it is of this stage; other layers keep nothing, and serve only for masks and positions
    has_kv: bool = False
    has_indexer: bool = False  # its sparse attention keeps keys of an indexer, too
    window: int | None = None  # of its attention, in tokens; None: it attends to all
    number_of_states: int = 0  # sets of recurrent states; 0: it is not recurrent
    # Measured with one token, because model families differ.
    kv: States = ()  # keys and values of one token
    places: tuple[tuple[str, int], ...] = ()  # kind and index of each recurrent state
    states: States = ()  # examples of the recurrent states

    @classmethod
    def of(cls, layer: Any, is_own: bool = True) -> Self:
        """Describes what a layer of transformers' own cache keeps, without sizes.

        Raises UnsupportedConfig for an unknown class of layer.
        """
        if type(layer) not in _KINDS:
            raise UnsupportedConfig(f"a layer keeps a {type(layer).__name__}, which stages do not")
        return cls(
            is_own,
            isinstance(layer, CacheLayerMixin),
            isinstance(layer, DynamicIndexedLayer),
            getattr(layer, "sliding_window", None),
            layer.number_of_states if isinstance(layer, LinearAttentionCacheLayerMixin) else 0,
        )

    def measured(self, layer: Any) -> "LayerMemory":
        """Returns a copy of this description with the sizes that `layer` has after its first token.

        layer: from the method `layer`. Raises UnsupportedConfig if the modules of the model do not use the cache.
        """
        if self.is_own and self.has_kv and not layer.tensors:
            raise UnsupportedConfig("transformers' modules of this model keep no KV")
        return replace(
            self,
            kv=tuple(tensor[:, :, :1] for tensor in layer.tensors) if self.has_kv else (),
            places=tuple(layer.places) if self.number_of_states else (),
            states=tuple(layer.states) if self.number_of_states else (),
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that the layer keeps for a token."""
        return sum(tensor.nbytes for tensor in self.kv)

    def layer(self, tokens: int) -> Any:
        """Returns a new cache layer for a sequence of `tokens`."""
        if self.has_indexer:
            return IndexedLayer(tokens)
        if self.number_of_states and self.has_kv:
            return StateAndReservedLayer(tokens, self.number_of_states)
        if self.number_of_states:
            return StateLayer(self.number_of_states)
        if not self.has_kv:
            return DummyLayer()
        return ReservedLayer(tokens) if self.window is None else WindowLayer(tokens, self.window)


def kept_tokens(window: int) -> int:
    """Returns the greatest number of tokens that a layer with a window keeps."""
    return window + GOING_BACK + _SPARE


class SequenceCache(Cache):  # type: ignore[misc]
    """The memory of one sequence in all layers, as a cache object for transformers' modules."""

    def __init__(self, memories: Sequence[LayerMemory], tokens: int) -> None:
        """Creates an empty cache for a sequence of at most `tokens`. memories: of all layers of the model, in order."""
        layers = [memory.layer(tokens) for memory in memories]
        super().__init__(layers=layers)
        self.own = [layer for layer, memory in zip(layers, memories, strict=True) if memory.is_own]  # of this stage
        self.position = 0  # tokens of the sequence before those of the present pass
        self.recurrent = [layer for layer in self.own if isinstance(layer, StateLayer)]
        # After which tokens of this pass the states are copied, and the copies of all layers so far.
        self.copied: dict[int, list[torch.Tensor]] = {}
        self.drafts_from: int | None = None  # the pass's tokens from this position on are draft tokens
        self.draft_inputs: dict[int, list[torch.Tensor]] = {}  # of each recurrent layer by its index, token by token

    def go_to(self, position: int) -> None:
        """Sets the length of the sequence in all layers to `position` tokens."""
        self.position = position
        for layer in self.layers:
            if isinstance(layer, ReservedLayer):
                layer.length = position
                if position == 0:
                    layer.first = 0
            if isinstance(layer, IndexedLayer):
                layer.position = position

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the length of the sequence.

        transformers' own method asks a layer with attention, which this stage may not have.
        """
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            sizes: tuple[int, int] = layer.get_mask_sizes(query_length)
            return sizes
        return self.position + query_length, 0


class TokenByToken:
    """Runs a recurrent module token by token, so that states and results do not depend on how a text is cut into chunks.

    For a single token, transformers' modules take their recurrent path. For several tokens they take another path, which rounds
    differently.
    """

    def __init__(self, module: Any) -> None:
        """Replaces the `forward` of `module` with this object."""
        self.layer: int = module.layer_idx
        self._whole = module.forward
        module.forward = self

    def __call__(self, hidden_states: torch.Tensor, cache: SequenceCache, **settings: Any) -> torch.Tensor:
        layer, position = cache.layers[self.layer], cache.position
        outputs = []
        for token in torch.split(hidden_states, 1, dim=1):
            if cache.drafts_from is not None and position >= cache.drafts_from:
                cache.draft_inputs.setdefault(self.layer, []).append(token)
            outputs.append(self._whole(token, cache=cache, **settings))
            position += 1
            if (copied := cache.copied.get(position)) is not None:
                copied += [state.clone() for state in layer.states]
        return torch.cat(outputs, dim=1)

    def repeat(self, cache: SequenceCache, tokens: int) -> None:
        """Updates the states again with the first `tokens` draft tokens of the last pass."""
        for token in cache.draft_inputs[self.layer][:tokens]:
            self._whole(token, cache=cache)


def run_token_by_token(model: nn.Module, recurrent_layers: Collection[int]) -> list[TokenByToken]:
    """Makes all recurrent modules of `model` run token by token, and returns them.

    recurrent_layers: indexes of the layers with a recurrent module. Raises UnsupportedConfig if the modules cannot be found.
    """
    found: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and any(isinstance(child, nn.Conv1d) for child in module.children())
    ]
    if sorted(module.layer_idx for module in found) != sorted(recurrent_layers):
        raise UnsupportedConfig(f"the recurrent modules of {type(model).__name__} are not known: found {len(found)}")
    return [TokenByToken(module) for module in found]
