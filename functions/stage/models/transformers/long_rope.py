"""Chooses the frequencies of LongRoPE position embeddings for each pass of a sequence.

LongRoPE has two sets of frequencies: for sequences within the model's original context, and for longer ones. transformers
chooses in every call, by the positions in it, and computes a sequence anew when it crosses the original context. Keys stay in
the KV cache, so all chunks of a long prompt must have the second set: the engine tells (`Segment.is_long`).
"""

from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from storage.checkpoints.families import mixes_longrope

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
            if getattr(module, "rope_type", None) == _LONGROPE:
                self._rotaries.append(_Rotary(module))
            elif mixes_longrope(module):
                raise UnsupportedRope("longrope in some kinds of layers and not in others is not supported")

    @property
    def short_context(self) -> int | None:
        """Most tokens of a sequence that has the first set of frequencies; None without LongRoPE."""
        return min((rotary.original for rotary in self._rotaries), default=None)

    def choose(self, is_long: bool) -> None:
        """Sets the frequencies for the sequence that is computed next."""
        for rotary in self._rotaries:
            rotary.choose(is_long)


class _Rotary:
    """One module of a model that computes LongRoPE embeddings, with both sets of frequencies."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.original: int = module.config.rope_parameters["original_max_position_embeddings"]
        self._short: torch.Tensor = module.inv_freq
        long, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, "cpu", seq_len=self.original + 1)
        self._long = long.to(self._short.device)
        module.rope_type = _CHOSEN

    def choose(self, is_long: bool) -> None:
        self._module.inv_freq = self._long if is_long else self._short
