"""How large the tensors are that operators make: memory is counted, not timed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While active, notes the largest memory that any operator of this thread has made. Views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.largest_by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        known = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and _address(made) not in known and _bytes(made) > self.largest_bytes:
                self.largest_bytes, self.largest_by = _bytes(made), f"{func} {tuple(made.shape)} {made.dtype}"
        return result


def _address(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _bytes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().nbytes()
