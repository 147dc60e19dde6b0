"""Tiny models for layers in C, and float32 groups with the same numbers in their matrices."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import torch

from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.native.group import NativeGroup
from tests.support.functions.borders import raw
from tests.support.functions.int8_checkpoints import dequantized, int8_checkpoint
from tests.support.functions.q4_checkpoints import plain, q4_checkpoint
from tests.support.storage import tiny_models

Group = TypeVar("Group", NativeGroup, LlamaGroup)

NAMES: Final = tiny_models.LLAMA_SHAPED
CUT: Final = ((0, 2), (2, 3), (3, 6))
BUDGET: Final = 2**22

_SHAPES: Final = ((64, 4, 2), (96, 6, 2), (160, 5, 1), (64, 4, 4), (64, 8, 4), (224, 7, 1))
"""Hidden size, heads, key heads: 1 to 7 queries share a key head."""
_BIASES: Final = {"qwen3": ("attention_bias",), "seed_oss": ("attention_out_bias", "mlp_bias")}
"""In addition to a family's own."""


def changes(name: str) -> dict[str, Any]:
    """Changes to the tiny model: every size is a multiple of 32, and all differ."""
    hidden_size, heads, kv_heads = _SHAPES[NAMES.index(name) % len(_SHAPES)]
    return {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size + 32,
        "head_dim": 32,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **dict.fromkeys(_BIASES.get(name, ()), True),
    }


@cache
def config(name: str) -> dict[str, Any]:
    return tiny_models.tiny_config(name, **changes(name))


@cache
def checkpoint(name: str, dtype: str, keep_wide: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Do not change it."""
    dtype = dtype.partition("/")[0]
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model(name, **changes(name)))
    for key, tensor in tensors.items():
        if tensor.ndim == 1:
            usual, times = (0, 10) if key.endswith(".bias") else (1, 5)
            tensor.sub_(usual).mul_(times).add_(usual)  # far enough from the usual value that a missing one shows
    if dtype == "int8":
        return int8_checkpoint(tensors, keep_wide)
    if dtype == "q4":
        return q4_checkpoint(tensors, keep_wide)
    return tensors if dtype == "float32" else {key: tensor.bfloat16() for key, tensor in tensors.items()}


def native_groups(
    name: str, dtype: str, cut: Sequence[tuple[int, int]] = CUT, keep_wide: Collection[str] = ()
) -> list[NativeGroup]:
    """dtype: of the weights, or of weights and KV, such as bfloat16/int8."""
    tensors = checkpoint(name, dtype, keep_wide)
    return [
        finished(native_group(config(name), first, last, dtype), tiny_models.stage_tensors(tensors, first, last))
        for first, last in cut
    ]


def native_group(config: dict[str, Any], first: int, last: int, dtype: str) -> NativeGroup:
    """A group without its weights. dtype: as for `native_groups`."""
    weights, _, kv = dtype.partition("/")
    return NativeGroup(config, first, last, weights, BUDGET, "int8" if kv == "int8" else None)


def finished(group: Group, tensors: dict[str, torch.Tensor]) -> Group:
    """The group with its weights."""
    group.place(raw(tensors))
    group.finish()
    return group


def torch_groups(name: str, dtype: str) -> list[LlamaGroup]:
    """The same models by torch's operators."""
    return [_torch_group(name, dtype, checkpoint(name, dtype), first, last) for first, last in CUT]


def exact_groups(name: str, dtype: str, keep_wide: Collection[str] = ()) -> list[LlamaGroup]:
    """The exact results that `native_groups` approximate: one torch group in float32 on numbers rounded to `dtype`."""
    stored = checkpoint(name, dtype, keep_wide)
    exact = dequantized({key: plain(each) if each.dtype == torch.uint8 else each for key, each in stored.items()})
    return [_torch_group(name, "float32", exact, 0, tiny_models.NUM_LAYERS)]


def _torch_group(name: str, dtype: str, tensors: dict[str, torch.Tensor], first: int, last: int) -> LlamaGroup:
    group = LlamaGroup(config(name), first, last, dtype, "cpu", BUDGET)
    return finished(group, tiny_models.stage_tensors(tensors, first, last))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the difference relative to the exact result."""
    return float((found - exact).norm() / exact.norm())
