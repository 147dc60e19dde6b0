"""The layers of a Llama-shaped group in C (`native`), for weights and passes that come as torch's tensors."""

from collections.abc import Callable, Sequence

import torch

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.models.llama.layer import LayerWeights
from functions.stage.models.llama.linear import Matrix, stacked
from functions.stage.native.layers import Layers, Linear, MatrixArrays, Sizes
from functions.stage.native.library import Library
from functions.stage.native.records import Array, Dtype
from storage.checkpoints.llama_config import LlamaConfig

_DTYPES = {torch.bfloat16: Dtype.BF16, torch.int8: Dtype.INT8, torch.float32: Dtype.F32}


class NativeLayers:
    """Layers of matrices in int8, bf16 or float32, with a KV arena in bf16 or float32."""

    def __init__(self, library: Library, model: LlamaConfig, first_layer: int, pool: KVPool) -> None:
        self._model = model
        self._first_layer = first_layer
        self._pool = pool
        self._layers = Layers(
            library,
            Sizes(
                num_layers=pool.num_layers,
                hidden_size=model.hidden_size,
                inner_size=model.intermediate_size,
                heads=model.num_heads,
                kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                eps=model.rms_norm_eps,
                capacity_tokens=pool.capacity_tokens,
                kv_dtype=_DTYPES[pool.dtype],
            ),
        )

    def place(self, layer: int, weights: LayerWeights) -> None:
        """layer: number in the whole model."""
        slot = layer - self._first_layer
        (qkv,) = _of_one_kind(weights.qkv, together=True)
        gate, up = _of_one_kind([weights.gate, weights.up])
        matrices = {"qkv": qkv, "out": weights.out, "gate": gate, "up": up, "down": weights.down}
        gains = {"input_gain": weights.input_gain, "qk_gain": weights.qk_gain, "mlp_gain": weights.mlp_gain}
        keys, values = self._pool.arena(slot)
        self._layers.place(
            slot,
            {name: _arrays(matrix) for name, matrix in matrices.items()},
            {name: None if gain is None else _array(gain.float()) for name, gain in gains.items()},
            (_array(keys), _array(values)),
            self._model.windows[layer],
            self._model.rotary[layer],
        )

    def __call__(self, hidden: torch.Tensor, segments: Sequence[Segment], rotations: torch.Tensor) -> torch.Tensor:
        """hidden float32 [n, hidden_size], overwritten with the result. As many threads as torch's operators take."""
        places = [(self._pool.start(segment.handle), segment.position, segment.length) for segment in segments]
        self._layers.run(hidden.numpy(), rotations.numpy(), places, torch.get_num_threads())
        return hidden

    def linear(self, matrix: Matrix) -> Callable[[torch.Tensor], torch.Tensor]:
        """A matrix by itself: float32 or bf16 [n, in] → float32 [n, out]."""
        return _OfTensors(self._layers.linear(_arrays(matrix)))


class _OfTensors:
    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._linear(x.float().contiguous().numpy(), torch.get_num_threads()))


def _arrays(matrix: Matrix) -> MatrixArrays:
    return MatrixArrays(
        _DTYPES[matrix.weight.dtype],
        _array(matrix.weight),
        None if matrix.scale is None else _array(matrix.scale),
        None if matrix.bias is None else _array(matrix.bias.float()),
    )


def _array(tensor: torch.Tensor) -> Array:
    """The same memory where the tensor is contiguous. numpy has no bf16: its bits."""
    tensor = tensor.contiguous()
    array: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _of_one_kind(matrices: Sequence[Matrix], *, together: bool = False) -> Sequence[Matrix]:
    """All of them int8, or all of them bf16, as far as they can be with some wide already; `together`: as one."""
    if len({matrix.weight.dtype for matrix in matrices}) > 1:
        matrices = [_wide(matrix) for matrix in matrices]
    return stacked(matrices) if together else matrices


def _wide(matrix: Matrix) -> Matrix:
    weight = matrix.weight if matrix.scale is None else matrix.weight * matrix.scale.unsqueeze(1)
    return Matrix(weight.bfloat16(), None, None if matrix.bias is None else matrix.bias.float())
