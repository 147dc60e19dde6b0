"""Matrices in torch: reads them from a published model, and multiplies with the fastest kernel for dtype and device.

On CPUs, fp32 and bf16 weights are reordered once for oneDNN, whose kernels also compute the residual sum, SiLU, and the product
of gate and up. When 8 sequences are decoded, the four matrices of 10 SmolLM2 layers take 3.8 ms in bf16 this way, and 5.6 ms
with `F.linear` (fp32: 11.7 and 19.2 ms). For 128 tokens they take 7.2 and 12.5 ms (Xeon with AMX, one thread).
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from functions.stage.models.layer_group import MissingTensors
from functions.stage.models.torch_border import weight_tensor
from storage.loading.weight_loader import RawTensor

_LARGEST: Final = 127.0  # of int8
_SMALLEST: Final = 1e-30  # least scale, so that a row of zeros is not divided by zero


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes in which a group computes and stores."""

    activations: torch.dtype
    matrices: torch.dtype | None  # None: each as it was published, int8 or a float
    kv: torch.dtype
    hidden: torch.dtype  # between stages


PRECISIONS: Final = {
    "float32": Precision(torch.float32, torch.float32, torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": Precision(torch.float16, torch.float16, torch.float16, torch.float16),
    "kept": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    # The int8 kernel returns float32, in which the small operators between matrices are fastest. Attention and the wire are
    # bound by memory: bfloat16 halves both, and perplexity does not change (docs/log.md).
    "int8": Precision(torch.float32, None, torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix with its scales and biases."""

    weight: torch.Tensor  # [out, in]
    scale: torch.Tensor | None = None  # [out], with an int8 weight
    bias: torch.Tensor | None = None  # [out], in the weight's dtype (int8: float32)

    def with_rows(self, rows: torch.Tensor) -> "Matrix":
        """Returns a copy of the matrix with the rows (outputs) that `rows` names, in that order."""
        scale = None if self.scale is None else self.scale[rows]
        bias = None if self.bias is None else self.bias[rows]
        return Matrix(self.weight[rows], scale, bias)


class TorchWeights:
    """The tensors whose names begin with one prefix. Methods take names without the prefix.

    `vector` and `matrix` remove a tensor from the mapping, so that its memory is freed after it was copied.
    """

    def __init__(
        self, tensors: MutableMapping[str, RawTensor], prefix: str, precision: Precision, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._precision = precision
        self._device = device

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def vector(self, name: str) -> torch.Tensor:
        """Removes a norm's gain and returns it in the dtype of activations. Raises MissingTensors."""
        return self._take(name).to(self._precision.activations)

    def matrix(self, name: str, biased: bool = False) -> Matrix:
        """Removes the matrix `name`.weight and returns it, with its scales and, if `biased`, its biases.

        Raises MissingTensors.
        """
        weight = self._take(f"{name}.weight")
        if weight.dtype == torch.int8:
            scale = self._take(f"{name}.weight_scale").float()
            return Matrix(weight, scale, self._take(f"{name}.bias").float() if biased else None)
        weight = weight.to(self._precision.matrices or weight.dtype)
        return Matrix(weight, None, self._take(f"{name}.bias").to(weight.dtype) if biased else None)

    def _take(self, name: str) -> torch.Tensor:
        try:
            return weight_tensor(self._tensors.pop(self._prefix + name)).to(self._device)
        except KeyError as missing:
            raise MissingTensors(f"{missing} is missing") from None


class Linear:
    """Multiplies activations x [n, in] by a weight matrix W and adds biases b. Results are [n, out].

    Subclasses implement the product. The other methods here use separate operators for SiLU, sum and factor; subclasses may
    override them with faster kernels.
    """

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x Wᵀ + b."""
        raise NotImplementedError

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns residual + x Wᵀ + b."""
        return self(x).add_(residual)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Returns silu(x Wᵀ + b)."""
        return functional.silu(self(x), inplace=True)

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Returns (x Wᵀ + b) * factor."""
        return self(x).mul_(factor)


@dataclass(frozen=True, slots=True)
class PlainLinear(Linear):
    """A `Linear` for any device and float dtype, with torch's standard operator."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class OneDnnLinear(Linear):
    """A `Linear` for fp32 or bf16 on CPUs: oneDNN's kernels, on a copy of the weight in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight.default(weight)
        self._bias = bias
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._unary(x, self._weight, self._bias, "none", [], "")
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._binary(x, residual, self._weight, self._bias, "add")
        return y

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._unary(x, self._weight, self._bias, "swish", [], "")
        return y

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._binary(x, factor, self._weight, self._bias, "mul")
        return y


class Int8Linear(Linear):
    """A `Linear` for int8 weights and float32 activations on CPUs, for use if layers cannot run in C.

    Weights have a scale for each output, and activations a scale for each row. Each activation becomes two int8 numbers.
    Products are summed exactly in int32, so the result of a row never depends on other rows. The kernel is oneDNN's, which is
    fast only with AMX: on other CPUs oneDNN has a reference kernel that is hundreds of times slower.

    One int8 number per activation would cost 3 to 5 % of perplexity, because a few channels of a row are far larger than the
    rest. So the remainder after truncation to int8 goes through the same kernel as a second row. That gives 14 bits in all, and
    costs at most 0.6 %. While decoding, two rows take as long as one, because most of the time goes to reading the matrix.
    docs/log.md has the numbers, and compares torch's other int8 operators.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight int8 [out, in], scale float32 [out], bias float32 [out]."""
        self._weight = torch.ops.onednn.qlinear_prepack.default(weight, None)
        self._scale = scale / _LARGEST
        self._zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self._bias = bias
        self._largest = torch.tensor(_LARGEST)
        self._matmul = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y, row_scale = self._products(x)
        return y.mul_(row_scale) if self._bias is None else torch.addcmul(self._bias, y, row_scale)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, row_scale = self._products(x)
        if self._bias is not None:
            residual = residual + self._bias
        return torch.addcmul(residual, y, row_scale)

    def _products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns unscaled products float32 [n, out], and scales [n, 1] by which the caller must multiply the rows."""
        row_scale = x.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST)
        steps = x * (self._largest / row_scale)
        rows = torch.empty((2 * len(x), x.shape[1]), dtype=torch.int8)
        whole, rest = rows.chunk(2)
        whole.copy_(steps)
        rest.copy_(steps.frac_().mul_(_LARGEST))
        y: torch.Tensor = self._matmul(
            *(rows, 1.0, 0, self._weight, self._scale, self._zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        of_whole, of_rest = y.chunk(2)
        return of_whole.add_(of_rest, alpha=1 / _LARGEST), row_scale


@dataclass(frozen=True, slots=True)
class CastLinear(Linear):
    """A `Linear` for activations whose dtype is not that of the matrix: converts them, and converts the result back.

    Some matrices of a model published in int8 need it, because they were published as floats.
    """

    inner: Linear
    dtype: torch.dtype  # of the activations of `inner`

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.to(self.dtype)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class ConcatLinear(Linear):
    """A `Linear` for stacked matrices of different dtypes: multiplies by each and concatenates the results."""

    parts: Sequence[Linear]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


def stacked(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Stacks the rows (outputs) of matrices. Returns a list with one matrix.

    If dtypes differ, returns a list of the unchanged matrices. Either all matrices must have biases, or none.
    """
    if len(matrices) == 1 or len({matrix.weight.dtype for matrix in matrices}) > 1:
        return list(matrices)
    scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    weight = torch.cat([matrix.weight for matrix in matrices])
    return [Matrix(weight, torch.cat(scales) if scales else None, torch.cat(biases) if biases else None)]


def linear(matrices: Sequence[Matrix], dtype: torch.dtype) -> Linear:
    """Returns the fastest `Linear` for activations of `dtype`. Outputs of several matrices are concatenated."""
    matrix, *others = stacked(matrices)
    if others:
        return ConcatLinear([linear([part], dtype) for part in (matrix, *others)])
    weight, bias = matrix.weight, matrix.bias
    own: Linear
    if matrix.scale is not None:
        own = Int8Linear(weight, matrix.scale, bias)
    else:
        own = OneDnnLinear(weight, bias) if _is_for_onednn(weight) else PlainLinear(weight, bias)
    own_dtype = torch.float32 if weight.dtype == torch.int8 else weight.dtype
    return own if own_dtype == dtype else CastLinear(own, own_dtype)


def _is_for_onednn(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
