"""A device that is not the CPU, on a machine that has none: tensors that compute as the CPU does and refuse
what a GPU's refuse.

`DEVICE` is torch's own device without numbers, on which every operator may be called; here, a tensor on it has its
numbers in a tensor on the CPU. Operators that mix it with tensors on the CPU fail as they fail on a GPU, and so does
`numpy()`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from functions.stage.models.layer_group import LayerGroup

DEVICE: Final = torch.device("meta")

_aten = torch.ops.aten
_TAKES_INDEXES_FROM_THE_CPU: Final = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
"""As on a GPU, where indexing with brackets does and `gather`, `index_select` and `embedding` do not."""
_COPIES: Final = (_aten._to_copy.default, _aten.copy_.default)


class _There(torch.Tensor):
    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "_There":
        there: _There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        there.here = here
        return there

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_There({self.here!r})"


class _Mode(TorchDispatchMode):
    """Takes what is created on the device, which has no tensor among its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    away = [isinstance(each, _There) for each in tensors]
    target = kwargs.get("device")
    if any(away) and func not in _COPIES:
        _refuse_a_mixture(func, tensors)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func is _aten.copy_.default or (func._schema.is_mutable and any(away) and not func._schema.name.endswith(".out")):
        return args[0]
    goes_there = any(away) if target is None else torch.device(target).type == DEVICE.type
    return tree_map(lambda each: _There(each) if isinstance(each, torch.Tensor) else each, result) if goes_there else result


def _refuse_a_mixture(func: Any, tensors: Sequence[torch.Tensor]) -> None:
    others = [each for each in tensors if not isinstance(each, _There) and each.ndim > 0]
    if others and not (func in _TAKES_INDEXES_FROM_THE_CPU and all(each.dtype == torch.int64 for each in others)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")


def _here(value: Any) -> Any:
    return value.here if isinstance(value, _There) else value


@contextmanager
def other_device(*groups: type[LayerGroup]) -> Iterator[None]:
    """Inside, `DEVICE` works, for layer groups of these classes as well."""
    tensor = torch.tensor

    def then_moved(data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.Tensor:
        made = tensor(data, dtype=dtype)
        return made if device is None else made.to(device)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for group in groups:
            for name in {"forward", "logits", "_measured"} & vars(group).keys():
                # Without their `inference_mode`, in which a tensor like these has no views.
                stack.enter_context(patch.object(group, name, inspect.unwrap(getattr(group, name))))
        # No mode sees how torch.tensor moves its result, so it is moved here.
        stack.enter_context(patch.object(torch, "tensor", then_moved))
        stack.enter_context(_Mode())
        yield
