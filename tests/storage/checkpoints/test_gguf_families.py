"""GGUF files of every supported architecture, written on the spot and compared with transformers' own reading."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.checkpoints.model_source import checkpoint_fingerprint, open_checkpoint
from storage.errors import ArchitectureUnsupported, CheckpointInvalid, StorageError
from tests.storage.checkpoints.test_gguf import TEXT
from tests.support.storage import tiny_models
from tests.support.storage.random_blocks import random_rows
from tests.support.storage.storage import default_model_metadata
from tests.support.storage.torch_tensors import assert_equal, checkpoint_floats, gguf_by_transformers

TOKENS = [*map(chr, range(33, 127)), "ab"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    **{f"mlp.experts.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")},
}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write_gguf(
    path: Path,
    family: str,
    extra_tensor: str = "",
    drop_tensor: str = "",
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: writer.add_tokenizer_pre("qwen2"),
    kind_of: Callable[[str], gguf.GGMLQuantizationType] = lambda name: gguf.GGMLQuantizationType.Q8_0,
    **changes: Any,
) -> Path:
    """Matrices as Q8_0, or what `kind_of` their names says, the rest as float32. What is in it is random; transformers says
    what it means. changes: to the tiny model's config."""
    model = tiny_models.whole_model(family, **changes)
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type.replace("_moe", "moe"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    add(writer)
    for name, tensor in with_experts_together(tiny_models.checkpoint_tensors(model)).items():
        if name != drop_tensor:
            add_tensor(writer, gguf_name(name), tensor, kind_of(name))
    if extra_tensor:
        add_tensor(writer, extra_tensor, torch.zeros(4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_experts_together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        found.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(tensor)
    return {name: torch.stack(each) if "experts." in name else each[0] for name, each in found.items()}


def add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0
) -> None:
    array = tensor.numpy()
    if array.ndim > 1 and not name.endswith("ffn_gate_inp.weight"):
        matrix = array.reshape(-1, array.shape[-1])
        try:
            rows = gguf.quants.quantize(matrix, kind)
        except NotImplementedError:
            rows = random_rows(kind.name, *matrix.shape, seed=len(writer.tensors[-1]), largest=3 * array.std())
        writer.add_tensor(name, rows.reshape(*array.shape[:-1], -1), raw_dtype=kind)
    else:
        writer.add_tensor(name, array.astype(np.float32))


@pytest.fixture(scope="module")
def default_fields() -> dict[str, Any]:
    return default_model_metadata()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_tensors_are_those_that_transformers_reads(family: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", family)
    checkpoint = open_gguf(path)
    assert_equal(checkpoint_floats(checkpoint), gguf_by_transformers(path, checkpoint)["tensors"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"extra_tensor": "blk.0.ffn_gate_inp.weight"},
            ArchitectureUnsupported,
            r"'blk\.0\.ffn_gate_inp\.weight' that no 'llama' has",
        ),
        ({"extra_tensor": "rope_freqs.weight"}, CheckpointInvalid, "values that are no factors"),
        ({"drop_tensor": "model.embed_tokens.weight"}, CheckpointInvalid, r"lacks token_embd\.weight"),
    ],
)
def test_tensors_that_have_no_place_or_are_missing_are_named(
    change: dict[str, Any], error: type[StorageError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        open_gguf(write_gguf(tmp_path / "x.gguf", "llama", **change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.factor", 4.0),
        ("rope.scaling.type", "longrope"),
        ("rope.scale_linear", 2.0),
        ("rope.scaling.attn_factor", 1.5),
        ("attention.value_length", 16),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("logit_scale", 2.0),
        ("expert_count", 8),
        ("vocab_size", 64),
        ("something.new", 1),
        ("tensor_data_layout", "Meta AI original pth"),
    ],
)
def test_a_key_that_changes_the_result_is_refused(key: str, value: float | str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureUnsupported, match=re.escape(f"llama.{key} = {value}")):
        open_gguf(write_gguf(tmp_path / "x.gguf", "llama", add=lambda writer: add_key(writer, key, value)))


def add_key(writer: gguf.GGUFWriter, key: str, value: float | str) -> None:
    put = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
    put(f"llama.{key}", value)


def test_a_llama_with_a_sliding_window_is_a_mistral(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(8)

    config = open_gguf(write_gguf(tmp_path / "x.gguf", "llama", add=add), tokenizer={}).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 8)


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scale_linear", 1.0), ("attention.sliding_window", 4096), ("expert_count", 0)]
)
def test_a_neutral_key_is_ignored(key: str, value: float, tmp_path: Path) -> None:
    plain = open_gguf(write_gguf(tmp_path / "plain.gguf", "llama"))
    same = open_gguf(write_gguf(tmp_path / "x.gguf", "llama", add=lambda writer: add_key(writer, key, value)))
    assert same.config == plain.config


def test_partly_rotated_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = gguf.GGUFWriter.add_rope_dimension_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_dimension_count", lambda writer, count: rotate(writer, count // 2))
    with pytest.raises(ArchitectureUnsupported, match=r"llama\.rope\.dimension_count = 4, which is read from GGUF only as 8"):
        open_gguf(write_gguf(tmp_path / "x.gguf", "llama"))


def test_heads_of_another_length_are_honoured(tmp_path: Path) -> None:
    assert open_gguf(write_gguf(tmp_path / "x.gguf", "llama_wide_heads")).config["head_dim"] == 16


def test_a_merge_without_tokens_is_refused(default_fields: dict[str, Any]) -> None:
    merges = [*default_fields["tokenizer.ggml.merges"], "no such"]
    with pytest.raises(CheckpointInvalid, match="merges 'no such', which are no tokens"):
        tokenizer_files(Path("x.gguf"), default_fields | {"tokenizer.ggml.merges": merges})


@pytest.mark.parametrize(("rules", "tokenizer_class"), [("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)])
def test_the_rules_are_those_of_transformers_own_tokenizers(
    rules: str, tokenizer_class: Any, default_fields: dict[str, Any]
) -> None:
    ours = Tokenizer.from_str(
        tokenizer_files(Path("x.gguf"), default_fields | {"tokenizer.ggml.pre": rules})["tokenizer.json"].decode()
    )
    tokens, merges = default_fields["tokenizer.ggml.tokens"], default_fields["tokenizer.ggml.merges"]
    theirs = tokenizer_class(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    assert ours.encode(TEXT).ids == theirs(TEXT)["input_ids"]


def split(path: Path, folder: Path) -> list[Path]:
    """Writes a GGUF file's tensors into two files as llama-gguf-split does: the metadata are in the first."""
    reader = gguf.GGUFReader(path)
    parts = [folder / f"tiny-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    item = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], item)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(parts))
        for tensor in reader.tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_split_file_is_read_by_any_of_its_parts(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", "llama")
    parts = split(whole, tmp_path)
    for part in parts:
        assert_equal(checkpoint_floats(open_gguf(part)), checkpoint_floats(open_gguf(whole)))
    before = checkpoint_fingerprint(parts[0])
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"?")
    assert checkpoint_fingerprint(parts[0]) != before
    with pytest.raises(CheckpointInvalid, match=r"one of 2 parts; name them -00001-of-00002\.gguf"):
        open_gguf(parts[0].rename(tmp_path / "alone.gguf"))
    with pytest.raises(CheckpointInvalid, match=r"lacks tiny-00001-of-00002\.gguf; fetch it"):
        open_gguf(parts[1])


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointInvalid, match=r"x\.gguf is big-endian, which is not read"):
        open_gguf(tmp_path / "x.gguf")


def test_another_tokenizer_can_be_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", add=lambda writer: writer.add_tokenizer_pre("of-tomorrow"))
    with pytest.raises(CheckpointInvalid, match="--tokenizer"):
        open_checkpoint(path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(CheckpointInvalid, match=r"has no tokenizer\.json"):
        open_checkpoint(path, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert open_checkpoint(path, folder).files["tokenizer.json"] == b"{}"
    assert b"hidden_size" in open_checkpoint(path, folder).files["config.json"]
