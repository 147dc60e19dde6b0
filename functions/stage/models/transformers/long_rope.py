"""Chooses the frequencies of LongRoPE position embeddings for each pass of a sequence.

LongRoPE has two sets of frequencies: one for sequences within the model's original context, and one for longer sequences.
transformers chooses the set in every call, by the positions in the call, and computes a sequence anew when it exceeds the
original context. Here keys stay in the KV cache, so all chunks of a long prompt must use the second set. The engine says which
set a sequence needs (`Segment.is_long`).
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from storage.checkpoints.families import mixes_longrope

_LONGROPE: Final = "longrope"
_CHOSEN: Final = "chosen here"  # a rope_type that transformers does not know, so that it never changes the frequencies


class UnsupportedRope(ValueError):
    """The position embeddings that the config describes are not supported. Publish another model."""


@dataclass(frozen=True, slots=True)
class _Rotary:
    """A module that computes LongRoPE embeddings, and both sets of frequencies."""

    module: Any
    original: int  # longest sequence with the first set of frequencies, in tokens
    short: torch.Tensor
    long: torch.Tensor


class LongRope:
    """All modules of a model that compute LongRoPE embeddings. In most models there are none, and `choose` does nothing."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UnsupportedRope if some kinds of layers use LongRoPE and others do not. No supported family does that."""
        self._rotaries: list[_Rotary] = []
        for module in model.modules():
            if getattr(module, "rope_type", None) == _LONGROPE:
                self._rotaries.append(_taken_over(module))
            elif mixes_longrope(module):
                raise UnsupportedRope("longrope in some kinds of layers and not in others is not supported")
        # Greatest length of a sequence with the first set of frequencies, in tokens.
        self.short_context = min((rotary.original for rotary in self._rotaries), default=None)

    def choose(self, is_long: bool) -> None:
        """Sets the frequencies for the sequence that runs next. is_long: whether it needs the second set."""
        for rotary in self._rotaries:
            rotary.module.inv_freq = rotary.long if is_long else rotary.short


def _taken_over(module: Any) -> _Rotary:
    """Makes a module of transformers keep the frequencies that `LongRope` chooses."""
    original: int = module.config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, "cpu", seq_len=original + 1)
    module.rope_type = _CHOSEN
    return _Rotary(module, original, module.inv_freq, long.to(module.inv_freq.device))
