"""Sizes of what each layer keeps of a sequence: KV, a recurrent state of fixed size, or both.

Only models whose layers differ in this need them. transformers' configuration classes supply names and defaults.
tests/functions/stage/models/test_recurrent.py compares the sizes with what a stage measures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from storage.checkpoints.decoder import Decoder
from storage.checkpoints.families import RECURRENT_ONLY, with_floats
from storage.errors import LibraryMissing


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of what one layer keeps of a sequence."""

    has_kv: bool
    tail_values: int  # of convolutions' last inputs, in the dtype of hidden states
    matrix_values: int  # of the recurrent state itself, in float32
    kv_heads: tuple[int, int] | None = None  # how many, and their size; None: as in the model's other layers

    def state_bytes(self, value_bytes: int) -> int:
        """Bytes of the layer's recurrent state of one sequence. value_bytes: bytes of a number in hidden states."""
        return self.tail_values * value_bytes + self.matrix_values * 4


def _delta_net(config: Any) -> tuple[int, int]:
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key + config.linear_num_value_heads * value
    return channels * config.linear_conv_kernel_dim, config.linear_num_value_heads * key * value


def _mamba(config: Any) -> tuple[int, int]:
    return config.intermediate_size * config.conv_kernel, config.intermediate_size * config.state_size


def _mamba_of_jamba(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    return inner * config.mamba_d_conv, inner * config.mamba_d_state


def _zamba(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    channels = inner + 2 * getattr(config, "mamba_ngroups", 0) * config.mamba_d_state
    return channels * config.mamba_d_conv, inner * config.mamba_d_state


def _mamba_2(heads: str, head_size: str, state_size: str, groups: str, kernel: str) -> Callable[[Any], tuple[int, int]]:
    """Returns a function that computes the sizes of a Mamba-2 layer from a config.

    Arguments: names of these sizes in the family's config.
    """

    def sizes(config: Any) -> tuple[int, int]:
        inner, state = getattr(config, heads) * getattr(config, head_size), getattr(config, state_size)
        return (inner + 2 * getattr(config, groups) * state) * getattr(config, kernel), inner * state

    return sizes


def _lightning(config: Any) -> tuple[int, int]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head**2, 0  # the matrix has the dtype of hidden states


def _xlstm(config: Any) -> tuple[int, int]:
    keys, values = (int(config.hidden_size * share) for share in (config.qk_dim_factor, config.v_dim_factor))
    return 0, keys * values // config.num_heads + keys + config.num_heads


_BAMBA: Final = _mamba_2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv")

# Numbers of a recurrent layer's tail and matrix, by model_type.
_SIZES: Final[dict[str, Callable[[Any], tuple[int, int]]]] = {
    "bamba": _BAMBA,
    "falcon_h1": _BAMBA,
    "falcon_mamba": _mamba,
    "granitemoehybrid": _BAMBA,
    "jamba": _mamba_of_jamba,
    "lfm2": lambda config: (config.hidden_size * config.conv_L_cache, 0),
    "lfm2_moe": lambda config: (config.hidden_size * config.conv_L_cache, 0),
    "mamba": _mamba,
    "mamba2": _mamba_2("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel"),
    "minimax": _lightning,
    "nemotron_h": _mamba_2("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    "olmo_hybrid": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_next": _delta_net,
    "recurrent_gemma": lambda config: (config.lru_width * (config.conv1d_width - 1), config.lru_width),
    "rwkv": lambda config: (2 * config.hidden_size, 3 * config.attention_hidden_size),
    "xlstm": _xlstm,
    "zamba": _zamba,
    "zamba2": _zamba,
}
_ATTENTION: Final = frozenset({"full_attention", "sliding_attention", "hybrid"})
_RECURRENT: Final = frozenset({"linear_attention", "conv", "hybrid"})


def described_sizes(model: Decoder) -> tuple[LayerSizes, ...]:
    """What each layer keeps of a sequence if Lamina's layers in C run the model; their states are float32.

    Empty if all layers keep KV of the same size and nothing else.
    """
    found = tuple(
        LayerSizes(
            has_kv=layer.attention is not None and layer.attention.kv_layer is None,
            tail_values=0,
            matrix_values=0 if layer.recurrent is None else layer.recurrent.state_values(model.hidden_size),
            kv_heads=None if layer.attention is None else (layer.attention.num_kv_heads, layer.attention.head_dim),
        )
        for layer in model.layers
    )
    return () if len(set(found)) == 1 and found[0].has_kv and not found[0].matrix_values else found


def layer_sizes(config: Mapping[str, Any]) -> tuple[LayerSizes, ...]:
    """What each layer keeps of a sequence if transformers' modules run the model of this config.json.

    Empty if the model has no recurrent layers. Raises LibraryMissing if it has some and transformers is not installed.
    """
    sizes = _SIZES.get(str(config.get("model_type")))
    if sizes is None:
        return ()
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # 0.6 s, which only these families pay
    except ImportError as error:
        raise LibraryMissing(f"the sizes of a {config['model_type']!r} take transformers", error) from error
    known = CONFIG_MAPPING[config["model_type"]].from_dict(with_floats(config))
    tail, matrix = sizes(known)
    only = config["model_type"] in RECURRENT_ONLY
    kinds = ["linear_attention"] * known.num_hidden_layers if only else known.layer_types
    return tuple(LayerSizes(kind in _ATTENTION, *((tail, matrix) if kind in _RECURRENT else (0, 0))) for kind in kinds)
