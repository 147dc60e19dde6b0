"""Converts the tensors of a published model to the arrays that C reads. Tensors in C's order are not copied."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final

import numpy as np

from functions.stage.models.floats import Array, Float32, HiddenDtype, narrowed, widened
from functions.stage.models.layer_group import MissingTensors
from functions.stage.models.packed_tensors import column_order, packing
from functions.stage.native.layers import MatrixArrays
from functions.stage.native.records import Dtype
from storage.checkpoints.decoder import Shapes
from storage.loading.weight_loader import RawTensor
from storage.models import q4
from storage.models.blocks import FORMATS, GROUP, BlockFormat, floats_of, packed_rows, single_rows, unpack

_DTYPES: Final = {"BF16": Dtype.BF16, "I8": Dtype.INT8, "F32": Dtype.F32}
_FLOATS: Final[Mapping[Dtype, HiddenDtype]] = {Dtype.BF16: "BF16", Dtype.F32: "F32"}
_NUMPY_DTYPES: Final = {"BF16": np.uint16, "I8": np.int8, "F32": np.float32, "F16": np.float16, "U8": np.uint8}
_MATRICES: Final = {
    "float32": Dtype.F32,
    "bfloat16": Dtype.BF16,
}  # dtype of a published model → dtype of its matrices in C; others stay as published


class NativeWeights:
    """The tensors whose names begin with one prefix. Methods take names without the prefix.

    `vector` and `matrix` remove a tensor from the mapping, so that its memory is freed after it was copied.
    """

    def __init__(
        self, tensors: MutableMapping[str, RawTensor], prefix: str, dtype: str, shapes: Shapes, *, transposed: bool = False
    ) -> None:
        """Gives access to the tensors whose names begin with `prefix`.

        dtype: of the published model. shapes: unpacked shapes of matrices, by name without the prefix.
        transposed: whether the published matrices are [width, outs].
        """
        self._tensors = tensors
        self._prefix = prefix
        self._shapes = shapes
        self._transposed = transposed
        self._matrices = _MATRICES.get(dtype)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def vector(self, name: str) -> Float32:
        """Removes a vector and returns it in float32. Raises MissingTensors."""
        dtype, array = self._take(name)
        return array if dtype == "F32" else widened(array, _FLOATS[_DTYPES[dtype]])

    def matrix(self, name: str, biased: bool = False) -> MatrixArrays:
        """Removes the matrix `name`.weight and returns it, with its scales and, if `biased`, its biases.

        Raises MissingTensors.
        """
        packed = packing(self._tensors, f"{self._prefix}{name}.weight")
        dtype, weights = self._take(f"{name}.weight")
        if self._transposed:
            weights = np.ascontiguousarray(weights.T)
        scales = self.vector(f"{name}.weight_scale") if dtype == "I8" else None
        biases = self.vector(f"{name}.bias") if biased else None
        if packed is not None:
            order = column_order(self._tensors, f"{self._prefix}{name}.weight", packed.shape[1])
            for kind in ("format", "order"):
                self._tensors.pop(f"{self._prefix}{name}.weight_{kind}", None)
            parts = ((packed.format, packed.shape[0]),)
            dtype_in_c = Dtype.FLOAT_BLOCKS if FORMATS[packed.format].floats else Dtype.BLOCKS
            return MatrixArrays(dtype_in_c, weights, None, biases, packed.shape, parts, order)
        if dtype == "U8":
            outs, width = self._shapes[f"{name}.weight"]
            return MatrixArrays(Dtype.Q4, weights, None, biases, (outs, width))
        matrix = MatrixArrays(_DTYPES[dtype], weights, scales, biases)
        return matrix if dtype == "I8" or self._matrices is None else converted(matrix, self._matrices)

    def _take(self, name: str) -> tuple[str, Array]:
        try:
            raw = self._tensors.pop(self._prefix + name)
        except KeyError as missing:
            raise MissingTensors(f"{missing} is missing") from None
        array = np.frombuffer(raw.data, _NUMPY_DTYPES[raw.dtype]).reshape(raw.shape)
        return ("F32", array.astype(np.float32)) if raw.dtype == "F16" else (raw.dtype, array)


def rows_of(matrix: MatrixArrays, rows: Array) -> Float32:
    """Returns a copy of the rows whose numbers are `rows`, in float32."""
    if matrix.dtype == Dtype.INT8:
        assert matrix.scales is not None
        return matrix.weights[rows].astype(np.float32) * matrix.scales[rows, None]
    if matrix.dtype == Dtype.Q4:
        return q4.dequantize(q4.packed_rows(matrix.weights, rows), len(rows), matrix.shape[1])
    if matrix.parts:
        form = _format(matrix)
        weights = floats_of(form, unpack(form, single_rows(form, matrix.weights, rows), len(rows), lanes=1))
        return weights if matrix.order is None else np.ascontiguousarray(weights[:, np.argsort(matrix.order)])
    return widened(matrix.weights[rows], _FLOATS[matrix.dtype])


def with_rows(matrix: MatrixArrays, rows: Array) -> MatrixArrays:
    """Returns a copy of the matrix with the rows (outputs) that `rows` names, in that order."""
    scales = None if matrix.scales is None else matrix.scales[rows]
    biases = None if matrix.biases is None else matrix.biases[rows]
    if matrix.dtype == Dtype.Q4:
        return MatrixArrays(Dtype.Q4, q4.packed_rows(matrix.weights, rows), None, biases, (len(rows), matrix.shape[1]))
    if matrix.parts:
        form, shape = _format(matrix), (len(rows), matrix.shape[1])
        weights = packed_rows(form, matrix.weights, rows)
        return MatrixArrays(matrix.dtype, weights, None, biases, shape, ((form.name, len(rows)),), matrix.order)
    return MatrixArrays(matrix.dtype, matrix.weights[rows], scales, biases)


def transposed(matrix: MatrixArrays, rows: Array) -> MatrixArrays:
    """Returns a transposed copy of the rows whose numbers are `rows`. It is float32 if the matrix is, otherwise bf16."""
    dtype = Dtype.F32 if matrix.dtype == Dtype.F32 else Dtype.BF16
    return MatrixArrays(dtype, np.ascontiguousarray(narrowed(rows_of(matrix, rows).T, _FLOATS[dtype])))


def _format(matrix: MatrixArrays) -> BlockFormat:
    """Returns the format of a matrix in blocks. The matrix must not be stacked from several."""
    ((name, _),) = matrix.parts
    return FORMATS[name]


def stacked(matrices: Sequence[MatrixArrays]) -> MatrixArrays:
    """Concatenates the rows (outputs) of matrices of one dtype. Either all have biases, or none has."""
    shape = (sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1])
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    biases = [matrix.biases for matrix in matrices if matrix.biases is not None]
    return MatrixArrays(
        matrices[0].dtype,
        _weights_stacked(matrices),
        np.concatenate(scales) if scales else None,
        np.concatenate(biases) if biases else None,
        None if matrices[0].packed_shape is None else shape,
        [part for matrix in matrices for part in matrix.parts],
        matrices[0].order,
    )


def _weights_stacked(matrices: Sequence[MatrixArrays]) -> Array:
    if matrices[0].parts:
        return np.concatenate([matrix.weights.reshape(-1) for matrix in matrices])
    together = np.concatenate([matrix.weights for matrix in matrices])
    if matrices[0].dtype != Dtype.Q4 or all(matrix.shape[0] % GROUP == 0 for matrix in matrices[:-1]):
        return together
    firsts = np.cumsum([0, *(len(matrix.weights) * GROUP for matrix in matrices[:-1])])
    rows = [first + np.arange(matrix.shape[0]) for first, matrix in zip(firsts, matrices, strict=True)]
    return q4.packed_rows(together, np.concatenate(rows))


def of_one_kind(matrices: Sequence[MatrixArrays]) -> Sequence[MatrixArrays]:
    """Returns the matrices unchanged if they can be stacked, otherwise all converted to bf16.

    They can be stacked if they have the same dtype and order of columns. Of matrices in blocks, all but the last must also have
    a whole number of row groups.
    """
    whole_groups = all(not matrix.parts or matrix.shape[0] % GROUP == 0 for matrix in matrices[:-1])
    orders = {None if matrix.order is None else matrix.order.tobytes() for matrix in matrices}
    if len({matrix.dtype for matrix in matrices}) == len(orders) == 1 and whole_groups:
        return matrices
    return [converted(matrix, Dtype.BF16) for matrix in matrices]


def converted(matrix: MatrixArrays, dtype: Dtype) -> MatrixArrays:
    """Returns the matrix in `dtype`, float32 or bf16. It is the same object if it has that dtype already."""
    if matrix.dtype == dtype:
        return matrix
    wide = rows_of(matrix, np.arange(matrix.shape[0]))
    return MatrixArrays(dtype, narrowed(wide, _FLOATS[dtype]), None, matrix.biases)
