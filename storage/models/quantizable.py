"""What is asked of a model that shall be published quantized, and which of its tensors then are. Imports no library."""

from collections.abc import Mapping
from typing import Any, Final

from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig
from storage.errors import ArchitectureUnsupported

_LAYER_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_QUANTIZED: Final = frozenset({"int8"})


def check_quantizable(config: Mapping[str, Any], dtype: str) -> None:
    """config: a config.json. Raises ArchitectureUnsupported for a model that no stage would run in this dtype.

    transformers runs floats alone; others than Llama-shaped families may have matrices of the same names all the same.
    """
    if dtype not in _QUANTIZED:
        return
    try:
        LlamaConfig.from_dict(config)
    except (UnsupportedConfig, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ArchitectureUnsupported(f"no stage would run it in {dtype}: {error}; publish it as bfloat16") from error


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor is a linear layer's matrix; norms, embedding and head are small, or what quality hangs on."""
    return len(shape) == 2 and name.endswith(tuple(f".{matrix}.weight" for matrix in _LAYER_MATRICES))
