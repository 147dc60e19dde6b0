"""Conversion in numpy, compared with torch's rounding bit for bit, so that earlier publications stay valid."""

from typing import Any, Final

import numpy as np
import pytest
import torch

from storage.checkpoints.checkpoint import SourceTensor
from storage.errors import CheckpointInvalid
from storage.models.conversion import convert_tensor
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor

TORCH: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TARGETS: Final[dict[Dtype, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAME: Final = "model.layers.0.mlp.up_proj.weight"


def source(tensor: torch.Tensor) -> SourceTensor:
    (name,) = [name for name, dtype in TORCH.items() if dtype == tensor.dtype]

    def rows(first: int, last: int) -> memoryview:
        return memoryview(bytearray(raw(tensor[first:last])))

    return SourceTensor(name, tuple(tensor.shape), rows)


def raw(tensor: torch.Tensor) -> bytes:
    array: Any = tensor.contiguous().view(torch.uint8).numpy()
    return bytes(array)


def written(target: TargetTensor) -> bytes:
    return b"".join(target.blocks())


def float_bits() -> torch.Tensor:
    """Float32 of every exponent, with what is halfway between two of a shorter type; infinities, denormals, both zeros."""
    top = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF], np.uint32)
    bits = (top | low).reshape(-1)
    return torch.from_numpy(bits[~np.isnan(bits.view(np.float32))].view(np.float32)).reshape(-1, 2)


def values_of(name: str) -> torch.Tensor:
    if name in ("F16", "BF16"):
        every: Any = np.arange(2**16, dtype=np.uint16).view(np.int16)
        tensor = torch.from_numpy(every).view(TORCH[name]).reshape(-1, 2)
        return tensor[~tensor.isnan().any(1)]
    # As float64 they have digits that float32 lacks: torch rounds twice, to float32 first.
    return float_bits() if name == "F32" else float_bits().double() * (1 + 2.0**-40)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("name", TORCH)
def test_floats_are_rounded_as_torch_rounds(name: str, dtype: Dtype) -> None:
    values = values_of(name)
    if dtype == "float16":  # beyond it is refused, below
        values = values[(values.to(torch.float16).isinf() == values.isinf()).all(1)]
    (target,) = convert_tensor("model.norm.weight", source(values), dtype).values()
    assert written(target) == raw(values.to(TARGETS[dtype]))


@pytest.mark.parametrize("dtype", TARGETS)
def test_nan_stays_nan(dtype: Dtype) -> None:
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    (target,) = convert_tensor("model.norm.weight", source(values), dtype).values()
    assert bool(torch.frombuffer(bytearray(written(target)), dtype=TARGETS[dtype]).isnan().all())


@pytest.mark.parametrize("name", TORCH)
def test_int8_equals_torchs(name: str) -> None:
    """The recipe that published models were made by, in torch."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(1031, 577, generator=generator, dtype=torch.float64) * torch.logspace(-30, 4, 1031)[:, None]
    values[3] = 0
    values[4, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5])  # a scale of one, and halves
    values[4, 5:] = 0
    values = values.to(TORCH[name]).clamp(-6e4, 6e4)
    rows = values.float()
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1.0
    matrix, scales = convert_tensor(NAME, source(values), "int8").items()
    assert (matrix[0], scales[0]) == (NAME, f"{NAME}_scale")
    assert written(matrix[1]) == raw((rows / scale).round().clamp(-127, 127).to(torch.int8))
    assert written(scales[1]) == raw(scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_refuses_numbers_that_are_not_finite(bad: float) -> None:
    values = torch.ones(4, 32)
    values[2, 5] = bad
    matrix = convert_tensor(NAME, source(values), "int8")[NAME]
    with pytest.raises(CheckpointInvalid, match=r"up_proj.weight' has values that are infinite or no numbers, .* bfloat16"):
        written(matrix)
