"""Says which model families stages run, and to which part of a model a tensor belongs. Imports no heavy library.

A family is a `model_type` of a checkpoint's config.json. Lamina's own layers run the families of a table (`decoder_families`).
Any other decoder runs with transformers' modules, unless this file lists it as refused. Publishing such a model first tests
whether it can be cut into stages.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from storage.errors import ArchitectureUnsupported

EMBEDDING_MODULES: Final = frozenset({
    "altup_projections", "embed_in", "embed_positions", "embed_tokens", "embed_tokens_per_layer", "embeddings", "emb_norm",
    "per_layer_model_projection", "per_layer_projection_norm", "positions_embed", "project_in", "tokens_embed", "w",
    "word_embeddings", "word_embeddings_layernorm", "wpe", "wte",
})  # fmt: skip
"""Names of modules before the layers, which the first stage runs."""
HEAD_MODULES: Final = frozenset({
    "altup_unembed_projections", "decoder", "embed_out", "embedding_norm", "final_layer_norm", "final_layernorm", "final_norm",
    "head", "layer_norm", "layernorm", "lm_head", "ln_f", "ln_out", "norm", "norm_f", "out_norm", "output_projection",
    "project_out",
})  # fmt: skip
"""Names of modules after the layers, which the last stage runs."""

REFUSED: Final[Mapping[str, str]] = {
    "blt": "its layers run over patches of bytes, not over tokens",
    "cpmant": "tokens of a prompt attend to later ones, so that its states depend on where the prompt ends",
    "deepseek_v4": "several residual streams pass between its layers, and its KV is compressed",
    "dory": "its layers run more than once for a token",
    "hrm_text": "its layers run more than once for a token",
    "hy_v4": "several residual streams pass between its layers",
    "inkling2_loop_text": "its layers run more than once for a token",
    "inkling2_text": "layers attend to the outputs of earlier layers",
    "inkling_text": "its layers have states beside keys and values of a window",
    "qwen4_exp_text": "its KV is compressed in blocks",
    "zaya": "its layers pass a second residual on",
}
"""Decoder-only text families that no stage runs, each with the reason."""
NO_TEXT_DECODERS: Final = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "gemma4_assistant", "git",
    "megatron-bert", "moshi", "phi4_multimodal", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
})  # fmt: skip
"""Model types that no stage runs although transformers counts them among causal language models.

They are encoders, drafters, and models that also process images or sound. Tokens of an XLM or XLNet attend to later tokens,
because both learned to fill in gaps. To generate, they need a masked token at the end.
"""
EMBEDDINGS_PASSED_ON: Final = frozenset({"zamba", "zamba2"})
"""Families whose layers get hidden states, embeddings and the layer's number.

Their stages send hidden states and embeddings to the next stage.
"""
RECURRENT_ONLY: Final = frozenset({"rwkv", "xlstm"})
"""Families without attention whose configs do not list the kinds of their layers."""

Tensor = TypeVar("Tensor")

_SHARED_BLOCK: Final = re.compile(r"(.*\blayers\.)(\d+)\.(linear\.weight|shared_transf(?:ormer)?\..+)")
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_served(config: Mapping[str, Any]) -> None:
    """Raises ArchitectureUnsupported, with the reason, if no stage runs the family of a config.json."""
    model_type = str(config.get("model_type"))
    if model_type in NO_TEXT_DECODERS:
        raise ArchitectureUnsupported(f"model_type {model_type!r} is not supported: it is no decoder-only text model")
    if model_type in REFUSED:
        raise ArchitectureUnsupported(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")


def layers_key(model_type: str) -> str:
    """Name of the attribute in transformers' config that counts the layers between which a model can be cut.

    A layer of LongCat has two attentions, and its `num_hidden_layers` counts attentions.
    """
    return "num_layers" if model_type == "longcat_flash" else "num_hidden_layers"


def part_of(tensor: str) -> int | Literal["embedding", "head"] | None:
    """The part of a model to which a checkpoint's tensor belongs: the number of a layer, `embedding` or `head`.

    None if the tensor's name is unknown.
    """
    if found := _LAYER.search(tensor):
        return int(found[1])
    modules = tensor.split(".")[:-1]
    if not EMBEDDING_MODULES.isdisjoint(modules):
        return "embedding"
    return None if HEAD_MODULES.isdisjoint(modules) else "head"


def with_shared_blocks(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Adds a tensor for every layer that uses a shared block of weights, as layers of Zamba do.

    The checkpoint has each shared block once, under the first layer that uses it. The other layers use the blocks in turn.
    Checkpoints without shared blocks are returned unchanged.
    """
    blocks: dict[int, dict[str, Tensor]] = {}
    sharing: dict[int, str] = {}  # layers with a shared block, and the prefix of their tensors
    for name, tensor in tensors.items():
        if found := _SHARED_BLOCK.match(name):
            prefix, number, rest = found.groups()
            sharing[int(number)] = f"{prefix}{number}."
            if rest != "linear.weight":
                blocks.setdefault(int(number), {})[rest] = tensor
    if not blocks:
        return tensors
    added: dict[str, Tensor] = {}
    sources = [blocks[number] for number in sorted(blocks)]
    for place, number in enumerate(sorted(sharing)):
        if number not in blocks:
            source = sources[place % len(sources)]
            added |= {f"{sharing[number]}{rest}": tensor for rest, tensor in source.items()}
    return {**tensors, **added}


def with_floats(value: Any) -> Any:
    """Replaces numbers that JSON lacks, for example {"__float__": "Infinity"}, by floats in a part of a config.json."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: with_floats(part) for name, part in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def mixes_longrope(module: object) -> bool:
    """Whether a transformers module has a rotation for each kind of layer and one is LongRoPE. No stage can run this."""
    rope_type = getattr(module, "rope_type", None)
    return isinstance(rope_type, Mapping) and "longrope" in rope_type.values()
