"""Supports families whose modules do not use transformers' caches for all their states.

transformers keeps these states in attributes of modules, in classes of the family's own, or not at all. Here each such module
gets another `forward`. It reads the states from the cache of the sequence that runs, and writes the new states back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from functions.stage.models.transformers.cache_layers import LayerMemory, SequenceCache, TokenByToken
from storage.checkpoints.families import RECURRENT_ONLY, layers_key

States = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Recurrent:
    """How to run a recurrent module that does not keep its states in a cache.

    begin: a function (module, token) that returns the states before the first token. The token is [1, 1, hidden size]. step: a
    function (module, the module's own `forward`, token, states, is first token) that returns the output for the token and the
    states after it. outputs: how many values `forward` returns; the first is the hidden states, and the others are never read.
    """

    module: str  # the class's name
    begin: Callable[[Any, torch.Tensor], States]
    step: Callable[[Any, Callable[..., Any], torch.Tensor, States, bool], tuple[torch.Tensor, States]]
    outputs: int
    has_attention: bool = False  # whether other layers have attention, which uses the cache that it is given


def _minimax_begin(attention: Any, token: torch.Tensor) -> States:
    size = attention.head_dim
    return (token.new_zeros(1, attention.num_attention_heads, size, size),)


def _minimax_step(
    attention: Any, forward: Callable[..., Any], token: torch.Tensor, states: States, is_first: bool
) -> tuple[torch.Tensor, States]:
    cache = SimpleNamespace(get_linear_cache=lambda _: states[0], set_linear_cache=lambda *_: None)
    output, state = forward(token, position_embeddings=None, attention_mask=None, cache=cache)
    return output, (state,)


def _recurrent_gemma_begin(block: Any, token: torch.Tensor) -> States:
    tail = token.new_zeros(1, block.lru_width, block.conv1d_width - 1)
    return tail, torch.zeros(1, block.lru_width, device=token.device)


def _recurrent_gemma_step(
    block: Any, forward: Callable[..., Any], token: torch.Tensor, states: States, is_first: bool
) -> tuple[torch.Tensor, States]:
    block.conv1d_state, block.rg_lru.recurrent_states = states
    position = torch.full((1, 1), int(not is_first), device=token.device)  # all but the first of a text are alike
    output, _ = forward(token, position_ids=position, attention_mask=None, use_cache=True)
    return output, (block.conv1d_state, block.rg_lru.recurrent_states)


def _rwkv_begin(block: Any, token: torch.Tensor) -> States:
    shape = (1, token.shape[-1], 1)
    wide = torch.zeros(1, block.attention.attention_hidden_size, 1, device=token.device)
    return token.new_zeros(shape), token.new_zeros(shape), wide, wide.clone(), wide - 1e30


def _rwkv_step(
    block: Any, forward: Callable[..., Any], token: torch.Tensor, states: States, is_first: bool
) -> tuple[torch.Tensor, States]:
    output, new, _ = forward(token, state=list(states), use_cache=True)
    return output / block.lamina_divisor, new


def _xlstm_begin(block: Any, token: torch.Tensor) -> States:
    mixer, heads = block.mlstm_layer, block.config.num_heads
    keys, values = mixer.qk_dim // heads, mixer.v_dim // heads
    shapes = ((1, heads, keys, values), (1, heads, keys), (1, heads, 1))
    return tuple(torch.zeros(shape, device=token.device) for shape in shapes)


def _xlstm_step(
    block: Any, forward: Callable[..., Any], token: torch.Tensor, states: States, is_first: bool
) -> tuple[torch.Tensor, States]:
    output, new = forward(token, tuple(states))
    return output, new


_RECURRENT: Final = {
    "minimax": _Recurrent("MiniMaxLightningAttention", _minimax_begin, _minimax_step, outputs=2, has_attention=True),
    "recurrent_gemma": _Recurrent(
        "RecurrentGemmaRecurrentBlock", _recurrent_gemma_begin, _recurrent_gemma_step, outputs=2, has_attention=True
    ),
    "rwkv": _Recurrent("RwkvBlock", _rwkv_begin, _rwkv_step, outputs=3),
    "xlstm": _Recurrent("xLSTMBlock", _xlstm_begin, _xlstm_step, outputs=2),
}


KEEPS_NO_KV: Final = frozenset({"openai-gpt"})
OUTSIDE: Final = KEEPS_NO_KV.union(_RECURRENT)
"""The model_type of all families whose modules do not use transformers' caches for all their states."""


class Running:
    """Holds the cache of the sequence that runs, for modules whose `forward` does not get the cache."""

    cache: SequenceCache


class _StatesOutside(TokenByToken):
    """Runs a recurrent module token by token, with states from the cache of the sequence that runs."""

    def __init__(self, module: Any, layer: int, family: _Recurrent, running: Running) -> None:
        module.layer_idx = layer
        self._family, self._running = family, running
        forward = module.forward
        super().__init__(module)
        self._whole = partial(self._step, module, forward)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        hidden = args[0] if args else settings["hidden_states"]
        return super().__call__(hidden, self._running.cache), *(None,) * (self._family.outputs - 1)

    def _step(self, module: Any, forward: Callable[..., Any], token: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        layer = cache.layers[self.layer]
        is_first = not layer.has_previous_state[0]
        states = self._family.begin(module, token) if is_first else layer.states
        output, new = self._family.step(module, forward, token, states, is_first)
        layer.restore([("recurrent", index) for index in range(len(new))], new)
        return output


class _AttentionWithoutKV:
    """GPT-1's attention with cached keys and values. transformers itself computes those of earlier tokens again."""

    def __init__(self, module: Any, layer: int, running: Running) -> None:
        self._module, self._layer, self._running = module, layer, running
        module.forward = self

    def __call__(self, x: torch.Tensor, attention_mask: object = None, output_attentions: bool = False) -> list[torch.Tensor]:
        module = self._module
        query, key, value = (module.split_heads(part) for part in module.c_attn(x).split(module.split_size, dim=2))
        keys, values = self._running.cache.update(key, value, self._layer)
        end, rows = keys.shape[-2], query.shape[-2]
        scores = torch.matmul(query, keys.transpose(-1, -2)) / value.shape[-1] ** 0.5
        causal = module.bias[:, :, end - rows : end, :end]
        weights = torch.softmax(scores * causal - 1e4 * (1 - causal), dim=-1)
        return [module.c_proj(module.merge_heads(torch.matmul(weights, values)))]


def memories(config: Any, first_layer: int, last_layer: int) -> list[LayerMemory]:
    """Describes what each layer of transformers' cache for a model keeps, without sizes.

    This stage has layers [first_layer, last_layer) of the model. A layer of the model with two attentions has two consecutive
    layers in the cache.
    """
    layers = DynamicCache(config=config).layers
    per_layer = len(layers) // getattr(config, layers_key(config.model_type))
    own = range(first_layer * per_layer, last_layer * per_layer)
    if config.model_type in RECURRENT_ONLY:
        return [LayerMemory(number in own, number_of_states=1) for number in range(len(layers))]
    return [LayerMemory.of(layer, number in own) for number, layer in enumerate(layers)]


def bring_in(base: Any, layers: nn.ModuleList, first_layer: int, running: Running) -> list[TokenByToken] | None:
    """Makes the layers of a stage keep their states in the cache that `running` holds.

    Returns the recurrent modules. None, without any change, for families that use transformers' caches. base: the module that
    calls the layers one after the other.
    """
    model_type = base.config.model_type
    if model_type in KEEPS_NO_KV:
        for number, layer in enumerate(layers, first_layer):
            _AttentionWithoutKV(layer.attn, number, running)
        return []
    family = _RECURRENT.get(model_type)
    if family is None:
        return None
    found: list[TokenByToken] = [
        _StatesOutside(module, number, family, running)
        for number, layer in enumerate(layers, first_layer)
        for module in layer.modules()
        if type(module).__name__ == family.module
    ]
    if model_type == "rwkv":
        base.config.rescale_every = 0  # it would count the layers from 0
        for number, block in enumerate(layers, first_layer):
            _rescale(block, number)
    return found


def _rescale(block: Any, number: int) -> None:
    """Rescales an RWKV layer as the whole model does, which halves the outputs of layers after each `rescale_every` layers.

    number: number of the layer in the whole model.
    """
    every = block.config.rescale_every
    block.lamina_divisor = 2 if every > 0 and (number + 1) % every == 0 else 1
    block.attention.layer_id = block.feed_forward.layer_id = 0  # the states are those of one layer
    for linear in (block.attention.output, block.feed_forward.value):
        linear.weight = nn.Parameter(linear.weight / 2 ** (number // every if every > 0 else 0), requires_grad=False)


def arguments(model_type: str, name: str, cache: SequenceCache) -> dict[str, Any]:
    """Returns the arguments about the cache for a model's `forward`. name: the name of the cache's parameter.

    Families that do not use transformers' caches get `use_cache=False`.
    """
    family = _RECURRENT.get(model_type)
    if family is None and model_type not in KEEPS_NO_KV:
        return {name: cache, "use_cache": True}
    return {name: cache, "use_cache": False} if family is not None and family.has_attention else {"use_cache": False}
