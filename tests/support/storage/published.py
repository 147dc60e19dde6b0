"""A seeded tiny chat model, published into a real S3 server: what function processes are started on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel

from eventing.wire.events import Cut, pipeline_fingerprint
from storage.models.model_repository import Dtype, ModelManifest
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.storage import tiny_models

SPECIAL: Final = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0 to 4; the 256 byte tokens come behind them."""
END_IDS: Final = (2, 4)
"""After either of them the model has said all."""
VOCAB_SIZE: Final = len(SPECIAL) + 256 + 3
CUT: Final = ((0, 2), (2, 4), (4, 6))
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
    model: PreTrainedModel
    """The oracle."""
    tokenizer: Tokenizer

    def fingerprint(self, cut: Cut = CUT) -> str:
        return pipeline_fingerprint(self.manifest.digest, cut, self.manifest.dtype)


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


def save_checkpoint(folder: Path) -> PreTrainedModel:
    """A Hugging Face folder; returns the model in it."""
    model = tiny_models.whole_model("llama", vocab_size=VOCAB_SIZE)
    model.generation_config.eos_token_id = list(END_IDS)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}')
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def published_model(folder: Path, dtype: Dtype = "float32") -> Iterator[Published]:
    """The model as `tiny`, for as long as the store runs."""
    model = save_checkpoint(folder / "checkpoint")
    with EmbeddedStore(folder / "store") as store:
        manifest = publish(folder / "checkpoint", ObjectStore(store.settings), "tiny", dtype)
        yield Published(store.settings, manifest, model, byte_tokenizer())
