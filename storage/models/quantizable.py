"""What is asked of a model that shall be published quantized, and which of its tensors then are. Imports no library."""

from collections.abc import Mapping
from typing import Any, Final

from storage.checkpoints.llama_shaped import LLAMA_FAMILIES
from storage.errors import ArchitectureUnsupported
from storage.models.model_repository import Dtype

_LAYER_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_QUANTIZED: Final = frozenset({"int8"})


def check_quantizable(config: Mapping[str, Any], dtype: Dtype) -> None:
    """config: a config.json. Raises ArchitectureUnsupported for a model that no stage would run in this dtype.

    Others than Llama-shaped families may have matrices of the same names and still be of another shape.
    """
    if dtype not in _QUANTIZED:
        return
    if (model_type := config.get("model_type")) not in LLAMA_FAMILIES:
        raise ArchitectureUnsupported(
            f"{dtype} is for Llama-shaped models ({', '.join(sorted(LLAMA_FAMILIES))}), not for a {model_type!r}; "
            "publish it as bfloat16"
        )
    if (activation := config.get("hidden_act") or "silu") != "silu":
        raise ArchitectureUnsupported(f"{dtype} is for models with SiLU, this one has {activation!r}; publish it as bfloat16")


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor is a linear layer's matrix; norms, embedding and head are small, or what quality hangs on."""
    return len(shape) == 2 and name.endswith(tuple(f".{matrix}.weight" for matrix in _LAYER_MATRICES))
