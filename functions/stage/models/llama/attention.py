"""Attention in torch: one or a few calls of torch's kernel for each sequence of a pass.

The linear layers see all rows of a pass as one matrix. Attention reads the blocks of each sequence in the KV pool, in place if
they are neighbours. Masks and the places of tokens are the same in every layer, so they are computed once per pass. A chunk
whose mask would be large is computed part by part, so that memory does not grow with the product of chunk and context.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch.nn import functional

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.kv_pool import TorchKVPool

_MASK_NUMBERS: Final = 2**20  # most numbers in a mask, unless a single row has more
_MASKS_KEPT: Final = 16  # most masks kept during a pass


class PassAttention:
    """Computes the attention of one pass, in all layers with the same window.

    window: how many tokens a token attends to, itself included. If None, it attends to all.
    """

    def __init__(self, segments: Sequence[Segment], pool: TorchKVPool, window: int | None, dtype: torch.dtype) -> None:
        self._segments = segments
        self._window = window
        self._dtype = dtype
        self._device = pool.device
        self._lengths = [segment.length for segment in segments]
        self._firsts = [self._first_seen(segment.position) for segment in segments]
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._readers = [
            pool.reader(segment.handle, first, segment.position + segment.length)
            for segment, first in zip(segments, self._firsts, strict=True)
        ]

    def __call__(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Computes the attention of one layer. Returns [n, num_heads * head_dim].

        queries: [n, num_kv_heads, heads per kv head, head_dim]. layer: number of the layer in the pool, which must already have
        the keys and values of these tokens.
        """
        parts = zip(self._segments, self._firsts, torch.split(queries, self._lengths), self._readers, strict=True)
        attended = [
            result
            for segment, first, own_queries, read in parts
            for result in self._segment(segment, first, own_queries, *read(layer))
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _segment(
        self, segment: Segment, first: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Yields the attention of one segment, in one or more parts. first: position of the first token in `keys`."""
        if segment.length == 1:
            # The heads that share a key head take the place of a chunk's tokens, so that each key is read once. Key heads are
            # the batch: the kernel's result is then in the order that the next matrix reads.
            yield functional.scaled_dot_product_attention(queries.transpose(0, 1), keys, values).view(1, -1)
        elif segment.position == 0 and (self._window is None or segment.length <= self._window):
            yield _chunk(queries, keys, values, None)
        else:
            for begin, end in self._blocks(segment):
                position = segment.position + begin
                seen = slice(self._first_seen(position) - first, segment.position + end - first)
                mask = self._mask(end - begin, position - self._first_seen(position))
                yield _chunk(queries[begin:end], keys[:, :, seen], values[:, :, seen], mask)

    def _blocks(self, segment: Segment) -> Iterator[tuple[int, int]]:
        """Splits the segment into blocks of rows [begin, end) whose masks have at most _MASK_NUMBERS numbers."""
        begin = 0
        while begin < segment.length:
            position = segment.position + begin
            back = position - self._first_seen(position)
            rows = max(1, (math.isqrt(back * back + 4 * _MASK_NUMBERS) - back) // 2)
            yield begin, (begin := min(begin + rows, segment.length))

    def _first_seen(self, position: int) -> int:
        """Returns the first position that the token at `position` attends to."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _mask(self, rows: int, back: int) -> torch.Tensor:
        """Returns the mask [rows, back + rows] to add to scores. The first row attends to `back` tokens before itself."""
        if (rows, back) not in self._masks:
            if len(self._masks) == _MASKS_KEPT:
                self._masks.clear()
            everything = torch.full((rows, back + rows), -math.inf, dtype=self._dtype, device=self._device)
            mask = everything.triu(back + 1)
            if self._window is not None and back + rows > self._window:
                mask += everything.tril_(back - self._window)
            self._masks[rows, back] = mask
        return self._masks[rows, back]


def _chunk(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the attention of a chunk. mask: added to scores.

    If `mask` is None, each token attends to all tokens before it in the chunk. This is for the first chunk of a prompt.
    """
    heads = queries.flatten(1, 2).transpose(0, 1).unsqueeze(0)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    attended = functional.scaled_dot_product_attention(heads, keys, values, mask, is_causal=mask is None, enable_gqa=True)
    return attended.squeeze(0).transpose(0, 1).flatten(1)
