"""Whether a group's layers run in machine code here. Imports numba only where they do."""

import logging
from typing import TYPE_CHECKING, Final

from functions.stage.models.llama.config import LlamaConfig
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.native.openmp import NoOpenMP
from functions.stage.native.shapes import STEP

if TYPE_CHECKING:
    from functions.stage.models.llama.native_layers import NativeLayers

_log: Final = logging.getLogger(__name__)
_DTYPES: Final = ("bfloat16", "int8")


def native_layers(model: LlamaConfig, first_layer: int, dtype: str, pool: KVPool) -> "NativeLayers | None":
    """None where torch's operators have to do: another dtype or device, odd sizes, no numba or none of GNU's OpenMP."""
    sizes = (model.hidden_size, model.intermediate_size, model.head_dim)
    if dtype not in _DTYPES or pool.device.type != "cpu" or any(size % STEP for size in sizes):
        return None
    try:
        from functions.stage.models.llama.native_layers import NativeLayers

        return NativeLayers(model, first_layer, pool)
    except (ImportError, NoOpenMP) as error:
        _log.warning("layers run by torch's operators, which is slower: %s", error)
        return None
