"""Whether a group's layers run in C here."""

import logging
from typing import Final

import torch

from functions.stage.native.library import UNAVAILABLE, Library, library
from functions.stage.native.limits import DTYPES, obstacle
from storage.checkpoints.llama_config import LlamaConfig

_log: Final = logging.getLogger(__name__)
_SLOWER: Final = "layers run by torch's operators, which is slower: %s"


def native_obstacle(model: LlamaConfig, dtype: str, device: torch.device) -> str | None:
    """What in the model, its dtype or its device is in the way."""
    return obstacle(dtype, device.type, {"head_dim": model.head_dim})


def native_library(model: LlamaConfig, dtype: str, device: torch.device) -> Library | None:
    """None where torch's operators have to do: another dtype or device, odd sizes, or no library and no compiler to make it.

    Says so in the log where layers in C were to be expected, on a CPU in one of their dtypes.
    """
    found = native_obstacle(model, dtype, device)
    if found is not None:
        if dtype in DTYPES and device.type == "cpu":
            _log.warning(_SLOWER, found)
        return None
    try:
        return library()
    except UNAVAILABLE as error:
        _log.warning(_SLOWER, error)
        return None
