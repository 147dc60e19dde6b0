"""Attention of the segments of one pass over the KV pool: one call of torch's kernel for each sequence.

The linear layers see all rows of a pass as one matrix; here each sequence reads its own range of the pool in place.
What is the same in every layer (masks, which tokens are read) is found once per pass.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.kv_pool import KVPool


class PassAttention:
    """The segments of one pass, in layers that look back `window` tokens (None: over everything)."""

    def __init__(self, segments: Sequence[Segment], pool: KVPool, window: int | None, dtype: torch.dtype) -> None:
        firsts = [0 if window is None else max(0, segment.position - window + 1) for segment in segments]
        self._lengths = [segment.length for segment in segments]
        self._masks = [
            _mask(segment, first, window, dtype, pool.device) for segment, first in zip(segments, firsts, strict=True)
        ]
        self._causal = [segment.length > 1 and mask is None for segment, mask in zip(segments, self._masks, strict=True)]
        # [layer][segment]: keys and values
        self._reads = list(
            zip(
                *(
                    pool.read(segment.handle, first, segment.position + segment.length)
                    for segment, first in zip(segments, firsts, strict=True)
                ),
                strict=True,
            )
        )

    def __call__(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Queries [n, num_kv_heads, heads per kv head, head_dim] of the pass → [n, num_heads * head_dim]."""
        attended = [
            _decode(segment_queries, keys, values) if length == 1 else _chunk(segment_queries, keys, values, mask, causal)
            for length, segment_queries, (keys, values), mask, causal in zip(
                self._lengths,
                torch.split(queries, self._lengths),
                self._reads[layer],
                self._masks,
                self._causal,
                strict=True,
            )
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _decode(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token: the heads that share a key head stand in for a chunk of tokens, so each key is read once.

    Key heads as the batch: the kernel's result then lies in memory as the next matrix reads it.
    """
    return functional.scaled_dot_product_attention(queries.transpose(0, 1), keys, values).view(1, -1)


def _chunk(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    heads = queries.flatten(1, 2).transpose(0, 1).unsqueeze(0)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    attended = functional.scaled_dot_product_attention(heads, keys, values, mask, is_causal=causal, enable_gqa=True)
    return attended.squeeze(0).transpose(0, 1).flatten(1)


def _mask(segment: Segment, first: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Additive [length, tokens read]; None where nothing but the future of a whole prompt is hidden, or nothing at all."""
    if segment.length == 1 or (segment.position == 0 and (window is None or segment.length <= window)):
        return None
    end = segment.position + segment.length
    distance = torch.arange(segment.position, end, device=device).unsqueeze(1) - torch.arange(first, end, device=device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
