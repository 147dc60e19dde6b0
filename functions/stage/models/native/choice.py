"""Whether layers run in C here."""

import logging
from typing import Final

from functions.stage.native.library import UNAVAILABLE, library
from functions.stage.native.limits import DTYPES, obstacle
from storage.checkpoints.llama_config import LlamaConfig

_log: Final = logging.getLogger(__name__)


def native_obstacle(model: LlamaConfig, dtype: str, device: str) -> str | None:
    """Why torch's operators have to do: another dtype or device, odd sizes, or no library and no compiler to make it.

    None: the layers run in C. Says so in the log where that was to be expected, on a CPU in one of their dtypes.
    """
    found = obstacle(dtype, device, {"head_dim": model.head_dim}) or _no_library()
    if found is not None and dtype in DTYPES and device == "cpu":
        _log.warning("layers run by torch's operators, which is slower: %s", found)
    return found


def _no_library() -> str | None:
    try:
        library()
    except UNAVAILABLE as error:
        return str(error)
    return None
