"""Tiny Llama-shaped models in GGUF files whose matrices have every block format."""

from pathlib import Path
from typing import Any, Final

from gguf import GGMLQuantizationType as Kind

from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.storage.random_blocks import IN_FILES

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
"""Widths of whole supers of 256 weights."""
EXPERTS: Final[dict[str, Any]] = {
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
"""Every token has all four experts, since rounding may change which are chosen."""
MIXED: Final = "mixed"


def kinds_of(name: str) -> dict[str, Kind]:
    """Formats of the matrices that differ in files of llama.cpp, by the ends of their names. name: a format, or `mixed`."""
    if name != MIXED:
        return {"": Kind[name]}
    matrices = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {matrix: Kind[IN_FILES[(5 * number + 7) % len(IN_FILES)]] for number, matrix in enumerate(matrices)}


def block_model(path: Path, family: str, name: str) -> Path:
    """A GGUF file. name: a format, or `mixed`."""
    kinds = kinds_of(name)

    def kind_of(tensor: str) -> Kind:
        return next((kind for matrix, kind in kinds.items() if matrix in tensor), Kind.Q8_0)

    return write_gguf(path, family, kind_of=kind_of, **SIZES, **(EXPERTS if "moe" in family else {}))
