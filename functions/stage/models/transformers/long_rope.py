"""Chooses LongRoPE's frequencies once for a whole sequence.

LongRoPE has two sets: for sequences within the model's original context, and for longer ones. transformers chooses in every
call, by the positions in it. Keys stay in the cache, so a sequence that grows beyond the original context would have keys of
both kinds, and so would a long prompt in chunks. Here the reserved length decides: all stages know it before the first token is
computed, and it is the same in every attempt.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LONGROPE: Final = "longrope"
_CHOSEN: Final = "chosen here"  # a type for which transformers chooses no frequencies


class UnsupportedRope(ValueError):
    """The position embeddings of this checkpoint's config are not supported. Publish another model."""


class LongRope:
    """The modules of a model that use LongRoPE; most models have none."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UnsupportedRope if only some kinds of layers use it, which no published family does."""
        self._rotaries: list[_Rotary] = []
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            if rope_type == _LONGROPE:
                self._rotaries.append(_Rotary(module))
            elif isinstance(rope_type, Mapping) and _LONGROPE in rope_type.values():
                raise UnsupportedRope("longrope in some kinds of layers and not in others is not supported")

    def choose(self, reserved_tokens: int) -> None:
        """Sets the frequencies for the sequence that is computed next, which has so many tokens reserved."""
        for rotary in self._rotaries:
            rotary.choose(reserved_tokens)


class _Rotary:
    def __init__(self, module: Any) -> None:
        self._module = module
        self._original: int = module.config.rope_parameters["original_max_position_embeddings"]
        self._short: torch.Tensor = module.inv_freq
        long, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, "cpu", seq_len=self._original + 1)
        self._long = long.to(self._short.device)
        module.rope_type = _CHOSEN

    def choose(self, reserved_tokens: int) -> None:
        self._module.inv_freq = self._long if reserved_tokens > self._original else self._short
