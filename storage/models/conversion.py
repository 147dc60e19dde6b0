"""Tensors of a checkpoint turned into tensors of a publication: another float type, or int8 with a scale per output channel."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol

from storage.checkpoints.checkpoint import SourceTensor
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.models.model_repository import Dtype

if TYPE_CHECKING:
    import torch

INT8_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of the Llama-shaped families. Norms, embedding and head stay bfloat16: small, or what quality hangs on."""

LLAMA_SHAPED: Final = frozenset({"llama", "ministral", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3"})
"""Families (`model_type`) that stages run in int8, by their lean layers (functions/stage/models/llama/config.py). Others may
have matrices of the same names and still be of another shape."""

_SAFETENSORS_NAME: Final[Mapping[Dtype, str]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "BF16"}
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_INT8_MAX: Final = 127


class TargetTensor(Protocol):
    """A tensor to be written. `blocks` are iterated in the order of the tensors, each time that the object is read."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def blocks(self) -> Iterator[memoryview]: ...


def check_int8(config: Mapping[str, Any]) -> None:
    """config: a config.json. Raises ArchitectureUnsupported for a model that no stage would run in int8."""
    if (model_type := config.get("model_type")) not in LLAMA_SHAPED:
        raise ArchitectureUnsupported(
            f"int8 is for Llama-shaped models ({', '.join(sorted(LLAMA_SHAPED))}), not for a {model_type!r}; "
            "publish it as bfloat16"
        )
    if (activation := config.get("hidden_act") or "silu") != "silu":
        raise ArchitectureUnsupported(f"int8 is for models with SiLU, this one has {activation!r}; publish it as bfloat16")


def convert_tensor(name: str, source: SourceTensor, dtype: Dtype, keep_wide: Collection[str]) -> dict[str, TargetTensor]:
    """What is stored for a decoder layer's tensor, by name: itself, or for int8 an I8 matrix and its F32 scales.

    `keep_wide` names matrices, such as down_proj, that stay bfloat16 in an int8 publication. Raises CheckpointInvalid
    for a tensor that is no float.
    """
    if source.dtype not in _FLOATS:
        raise CheckpointInvalid(f"tensor {name!r} is {source.dtype}, no float; publish the unquantized checkpoint")
    if dtype == "int8" and is_int8_matrix(name, source) and name.split(".")[-2] not in keep_wide:
        matrix = _Int8Matrix(source)
        return {name: matrix, f"{name}_scale": _Int8Scale(matrix)}
    return {name: _Converted(name, source, _SAFETENSORS_NAME[dtype])}


def is_int8_matrix(name: str, source: SourceTensor) -> bool:
    """Whether int8 stores this tensor of a decoder layer as I8."""
    return len(source.shape) == 2 and name.endswith(tuple(f".{matrix}.weight" for matrix in INT8_MATRICES))


@dataclass(frozen=True, slots=True)
class _Converted:
    name: str
    source: SourceTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def blocks(self) -> Iterator[memoryview]:
        for block in self.source.blocks():
            yield block if self.source.dtype == self.dtype else self._convert(block)

    def _convert(self, block: memoryview) -> memoryview:
        values = _tensor(block, self.source.dtype)
        converted = values.to(_torch_dtype(self.dtype))
        if self.dtype == "F16" and bool(converted.isinf().any()) and not bool(values.isinf().any()):
            raise CheckpointInvalid(f"tensor {self.name!r} has values beyond float16; publish it as bfloat16 or float32")
        return _bytes(converted)


class _Int8Matrix:
    """Symmetric: `weight[i, j] = int8[i, j] * scale[i]`, scale = largest magnitude of output channel i / 127."""

    dtype = "I8"

    def __init__(self, source: SourceTensor) -> None:
        self._source = source
        self.shape = source.shape
        self.scales: list[memoryview] = []
        """Of the last iteration."""

    def blocks(self) -> Iterator[memoryview]:
        import torch

        self.scales = []
        for block in self._source.blocks():
            rows = _tensor(block, self._source.dtype).to(torch.float32).view(-1, math.prod(self.shape[1:]))
            scale = rows.abs().amax(dim=1, keepdim=True) / _INT8_MAX
            scale[scale == 0] = 1.0
            self.scales.append(_bytes(scale))
            yield _bytes((rows / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8))


@dataclass(frozen=True, slots=True)
class _Int8Scale:
    matrix: _Int8Matrix
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape[:1]

    def blocks(self) -> Iterator[memoryview]:
        yield from self.matrix.scales


@cache
def _torch_dtype(name: str) -> "torch.dtype":
    import torch  # 1.2 s, which only a conversion pays

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def _tensor(block: memoryview, dtype: str) -> "torch.Tensor":
    import torch

    return torch.frombuffer(block, dtype=_torch_dtype(dtype))


def _bytes(tensor: "torch.Tensor") -> memoryview:
    import torch

    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
