"""What is asked of a model that shall be published quantized, and which of its tensors then are. Imports no library."""

from collections.abc import Mapping
from typing import Any, Final

from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig
from storage.errors import ArchitectureUnsupported

_LAYER_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MOST_HEAD: Final = 1024
"""LAMINA_MOST_HEAD of functions/stage/native/c/native.h."""
_QUANTIZED: Final = frozenset({"int8", "q4"})


def check_quantizable(config: Mapping[str, Any], dtype: str) -> None:
    """config: a config.json. Raises ArchitectureUnsupported for a model that no stage would run in this dtype.

    transformers runs floats alone; others than Llama-shaped families may have matrices of the same names all the same.
    """
    if dtype not in _QUANTIZED:
        return
    try:
        head_dim = LlamaConfig.from_dict(config).head_dim
    except (UnsupportedConfig, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ArchitectureUnsupported(f"no stage would run it in {dtype}: {error}; publish it as bfloat16") from error
    if dtype == "q4" and head_dim > _MOST_HEAD:
        raise ArchitectureUnsupported(
            f"no stage would run it in q4: layers in C have heads of at most {_MOST_HEAD} numbers, this model's {head_dim}; "
            "publish it as bfloat16"
        )


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor is a linear layer's matrix."""
    return len(shape) == 2 and name.endswith(tuple(f".{matrix}.weight" for matrix in _LAYER_MATRICES))


def is_outer_matrix(name: str) -> bool:
    """Whether this tensor is the matrix of a Llama-shaped model's embedding or head."""
    return name in ("model.embed_tokens.weight", "lm_head.weight")
