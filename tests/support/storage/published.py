"""A seeded tiny chat model, published into a real S3 server, for the functions that a test starts. Needs no torch."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from eventing.wire.events import Cut, fingerprint_of
from storage.models.model_repository import Dtype, ModelManifest
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL: Final = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 0 to 4; the 256 byte tokens follow
END_IDS: Final = (2, 4)  # either of them ends an answer
VOCAB_SIZE: Final = len(SPECIAL) + 256 + 3
CUT: Final = ((0, 2), (2, 4), (4, 6))
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": VOCAB_SIZE,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Published:
    store: StoreSettings
    manifest: ModelManifest
    load_model: "Callable[[], PreTrainedModel]"
    tokenizer: Tokenizer

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The oracle: the whole model in transformers."""
        return self.load_model().eval()

    def expected(self, prompt: str | Sequence[int], new_tokens: int) -> list[int]:
        """The oracle's greedy answer: token ids up to the first end token. Imports torch."""
        from tests.support.storage.tiny_models import greedy

        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        return until_end(greedy(self.model, ids, new_tokens))

    def fingerprint(self, cut: Cut = CUT) -> str:
        return fingerprint_of([(self.manifest.dtype, self.manifest.digest)], cut)


def until_end(token_ids: Iterable[int]) -> list[int]:
    """What comes before the first end token."""
    return list(takewhile(lambda token: token not in END_IDS, token_ids))


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with three merges; puts <s> before a text, as its post-processor says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "th", "the", "Ġthe"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return tokenizer


def save_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a Hugging Face folder. Every weight is random, so that a skipped norm or a wrong position changes the tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": list(END_IDS), "pad_token_id": 0})
    )
    _write_safetensors(folder / "model.safetensors", checkpoint_tensors(seed))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}')
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def checkpoint_tensors(seed: int = 0) -> dict[str, Any]:
    hidden, intermediate, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 16
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> Any:
        return (random.standard_normal(shape) * 2 / shape[-1] ** 0.5).astype(np.float32)

    def gain() -> Any:
        return (1 + random.standard_normal(hidden) * 0.1).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden)}
    for number in range(CONFIG["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": matrix(hidden, hidden),
            "self_attn.k_proj": matrix(kv, hidden),
            "self_attn.v_proj": matrix(kv, hidden),
            "self_attn.o_proj": matrix(hidden, hidden),
            "mlp.gate_proj": matrix(intermediate, hidden),
            "mlp.up_proj": matrix(intermediate, hidden),
            "mlp.down_proj": matrix(hidden, intermediate),
            "input_layernorm": gain(),
            "post_attention_layernorm": gain(),
        }
        tensors |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
    return tensors | {"model.norm.weight": gain(), "lm_head.weight": matrix(VOCAB_SIZE, hidden)}


def save_gguf(path: Path, seed: int = 0) -> None:
    """Writes the model as a GGUF file whose matrices have five block formats in turn."""
    import gguf

    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]
    tokenizer = json.loads(byte_tokenizer().to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(CONFIG["head_dim"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(tokenizer["vocab"]))
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (VOCAB_SIZE - len(SPECIAL)))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for number, (name, tensor) in enumerate(checkpoint_tensors(seed).items()):
        own, kind = names.get_name(name, (".weight",)), kinds[number % len(kinds)]
        if tensor.ndim == 2:
            writer.add_tensor(own, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    """float32 only: header size, JSON header, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(tensor.tobytes() for tensor in tensors.values()))


@contextmanager
def published_model(
    folder: Path, dtype: Dtype = "float32", name: str = "tiny", store: StoreSettings | None = None, family: str | None = None
) -> Iterator[Published]:
    """The model by its name, in a store of its own or in `store`, which runs. In dtype kept its source is a GGUF file.

    family: a tiny model of tiny_models.py, which takes its place but for tokenizer and end tokens, and needs torch.
    """

    def load_model() -> "PreTrainedModel":
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
        model.generation_config.eos_token_id = None  # `generate` does not stop at an end token
        return model

    save_checkpoint(folder / "checkpoint")
    if family is not None:
        from tests.support.storage.tiny_models import whole_model

        generation = (folder / "checkpoint" / "generation_config.json").read_bytes()
        whole_model(family, vocab_size=VOCAB_SIZE).save_pretrained(folder / "checkpoint")
        (folder / "checkpoint" / "generation_config.json").write_bytes(generation)
    with ExitStack() as stack:
        settings = store or stack.enter_context(EmbeddedStore(folder / "store")).settings
        source = folder / "checkpoint"
        if dtype == "kept":
            save_gguf(source := folder / "tiny.gguf")
        manifest = publish(source, ObjectStore(settings), name, dtype)
        yield Published(settings, manifest, load_model, byte_tokenizer())
