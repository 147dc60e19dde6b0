"""Tiny models that make vectors or scores of texts, as folders that sentence-transformers and transformers would write."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.storage.published import VOCAB_SIZE, Published, byte_tokenizer
from tests.support.storage.tiny_models import redraw, tiny_config

DENSE: Final = (("2_Dense", 32, 96, "Identity"), ("3_Dense", 96, 24, "Tanh"))
_MODULE: Final = "sentence_transformers.models"
_ACTIVATIONS: Final = {"Identity": "torch.nn.modules.linear.Identity", "Tanh": "torch.nn.modules.activation.Tanh"}


@dataclass(frozen=True)
class TinyEmbedder:
    published: Published
    model: PreTrainedModel  # the whole one in transformers
    dense: list[tuple[torch.Tensor, torch.Tensor | None, str]]

    @torch.inference_mode()
    def vector(self, token_ids: list[int], pooling: str) -> torch.Tensor:
        """The oracle, before it is normalized."""
        states = self.model(torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
        vector: torch.Tensor = states[-1] if pooling == "last" else states.mean(0)
        for weight, bias, activation in self.dense:
            vector = torch.nn.functional.linear(vector, weight, bias)
            vector = torch.tanh(vector) if activation == "Tanh" else vector
        return vector


def save_gemma_embedder(folder: Path, **changes: Any) -> list[tuple[torch.Tensor, torch.Tensor | None, str]]:
    """The shape of EmbeddingGemma: attention in both directions, a mean, two dense layers. Returns these."""
    config = tiny_config("gemma3_text", vocab_size=VOCAB_SIZE, use_bidirectional_attention=True)
    _save(AutoModel, folder, config, {"matryoshka_dimensions": [16, 8], **changes})
    modules = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    _save_modules(folder, modules, "pooling_mode_mean_tokens")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    generator = torch.Generator().manual_seed(1)
    layers: list[tuple[torch.Tensor, torch.Tensor | None, str]] = []
    for name, ins, outs, activation in DENSE:
        weight = torch.randn(outs, ins, generator=generator) / ins**0.5
        bias = torch.randn(outs, generator=generator) * 0.1 if activation == "Tanh" else None
        layers.append((weight, bias, activation))
        (folder / name).mkdir()
        save_file(
            {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias}), folder / name / "model.safetensors"
        )
        settings = {"in_features": ins, "out_features": outs, "bias": bias is not None}
        (folder / name / "config.json").write_text(json.dumps(settings | {"activation_function": _ACTIVATIONS[activation]}))
    return layers


def save_qwen_embedder(folder: Path) -> None:
    """The shape of Qwen3-Embedding: a causal model whose last token's state is the vector. Its folder has a head."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen3", vocab_size=VOCAB_SIZE, tie_word_embeddings=False)
    _save(AutoModelForCausalLM, folder, config, {"is_matryoshka": True})
    _save_modules(folder, ["Transformer", "Pooling", "Normalize"], "pooling_mode_lasttoken")


def save_classifier(folder: Path, labels: int = 1) -> None:
    """A causal model with a classifier of pairs of texts."""
    config = tiny_config("qwen3", vocab_size=VOCAB_SIZE)
    _save(AutoModelForSequenceClassification, folder, config | {"num_labels": labels, "pad_token_id": 0}, {})


def _save(kind: Any, folder: Path, config: dict[str, Any], changes: dict[str, Any]) -> None:
    model = kind.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        redraw(model, 0)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | changes))
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def _save_modules(folder: Path, kinds: list[str], pooling: str) -> None:
    modules = []
    for number, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{number}_{kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": f"{_MODULE}.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, pooling: True, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@contextmanager
def published_embedder(folder: Path, save: Any, dtype: str = "float32") -> Iterator[TinyEmbedder]:
    """An embedder as `tiny`, while the store runs. save: one of the functions above."""
    dense = save(folder / "checkpoint") or []
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    kind = AutoModelForSequenceClassification if save is save_classifier else AutoModel
    model = kind.from_pretrained(folder / "checkpoint", config=config).eval()
    with EmbeddedStore(folder / "store") as store:
        manifest = publish(folder / "checkpoint", ObjectStore(store.settings), "tiny", dtype)
        published = Published(store.settings, manifest, lambda: model, byte_tokenizer())
        yield TinyEmbedder(published, model, dense)
