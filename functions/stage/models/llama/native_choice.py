"""Whether a group's layers run in machine code here. Imports numba only where they do."""

import logging
from typing import TYPE_CHECKING, Final

from functions.stage.models.llama.config import LlamaConfig
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.native.limits import DTYPES, obstacle
from functions.stage.native.openmp import NoOpenMP

if TYPE_CHECKING:
    from functions.stage.models.llama.native_layers import NativeLayers

_log: Final = logging.getLogger(__name__)
_SLOWER: Final = "layers run by torch's operators, which is slower: %s"


def native_obstacle(model: LlamaConfig, dtype: str, pool: KVPool) -> str | None:
    """What in the model, its dtype or its device is in the way."""
    sizes = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "head_dim": model.head_dim,
    }
    return obstacle(dtype, pool.device.type, sizes)


def native_layers(model: LlamaConfig, first_layer: int, dtype: str, pool: KVPool) -> "NativeLayers | None":
    """None where torch's operators have to do: another dtype or device, odd sizes, no numba or none of GNU's OpenMP.

    Says so in the log where machine code was to be expected, on a CPU in one of its dtypes.
    """
    found = native_obstacle(model, dtype, pool)
    if found is not None:
        if dtype in DTYPES and pool.device.type == "cpu":
            _log.warning(_SLOWER, found)
        return None
    try:
        from functions.stage.models.llama.native_layers import NativeLayers

        return NativeLayers(model, first_layer, pool)
    except (ImportError, NoOpenMP) as error:
        _log.warning(_SLOWER, error)
        return None
