"""Chooses the frequencies of LongRoPE position embeddings once for a whole sequence.

LongRoPE has two sets of frequencies: for sequences within the model's original context, and for longer ones. transformers
chooses in every call, by the positions in it. Keys stay in the KV cache, so a sequence that grows beyond the original context,
or a long prompt in chunks, would have keys of both sets. Here the number of reserved tokens decides: all stages know it before
the first token is computed, and it is the same in every attempt.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LONGROPE: Final = "longrope"
_CHOSEN: Final = "chosen here"  # a rope_type that transformers does not know, so that it never changes the frequencies


class UnsupportedRope(ValueError):
    """The position embeddings of this checkpoint's config are not supported. Publish another model."""


class LongRope:
    """All modules of a model that compute LongRoPE embeddings. Most models have none: then `choose` does nothing."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UnsupportedRope if some kinds of layers use LongRoPE and others do not. No supported family does that."""
        self._rotaries: list[_Rotary] = []
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            if rope_type == _LONGROPE:
                self._rotaries.append(_Rotary(module))
            elif isinstance(rope_type, Mapping) and _LONGROPE in rope_type.values():
                raise UnsupportedRope("longrope in some kinds of layers and not in others is not supported")

    def choose(self, reserved_tokens: int) -> None:
        """Sets the frequencies for the sequence that is computed next. reserved_tokens: those of the sequence."""
        for rotary in self._rotaries:
            rotary.choose(reserved_tokens)


class _Rotary:
    """One module of a model that computes LongRoPE embeddings, with both sets of frequencies."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._original: int = module.config.rope_parameters["original_max_position_embeddings"]
        self._short: torch.Tensor = module.inv_freq
        long, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, "cpu", seq_len=self._original + 1)
        self._long = long.to(self._short.device)
        module.rope_type = _CHOSEN

    def choose(self, reserved_tokens: int) -> None:
        self._module.inv_freq = self._long if reserved_tokens > self._original else self._short
