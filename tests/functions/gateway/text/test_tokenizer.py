"""Chat templates and tokens are those of transformers."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eventing.problems import ContextExceeded, InvalidRequest
from eventing.wire.generation import Message
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.tokenizer import ModelText
from storage.models.model_repository import ModelManifest, StoredFile
from tests.support.functions.sentencepiece import llama_2
from tests.support.storage.published import CHAT_TEMPLATE, byte_tokenizer

TEXTS = [
    "hello", "The capital of France is", "12345 + 67", "naïve 😀 日本語", " leading and  double  spaces\n\n", "the other then",
]  # fmt: skip
MESSAGES = (
    Message("system", "Be brief."),
    Message("user", "Hi <b>&</b> 😀"),
    Message("assistant", "Hello."),
    Message("user", "the"),
)
TURNS = [{"role": message.role, "content": message.content} for message in MESSAGES]
TEMPLATES = [
    CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "   {% if add_generation_prompt %}\n<assistant>{% endif %}\n",
]


def transformers_tokenizer(folder: Path, template: str) -> Any:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"})
    )
    (folder / "chat_template.jinja").write_text(template)
    return AutoTokenizer.from_pretrained(folder)


class Folder:
    """An ObjectReader over a dict of a publication's files."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}

    def get(self, key: str) -> bytes:
        return self.files[key]

    def manifest(self) -> ModelManifest:
        stored = {name: StoredFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in self.files.items()}
        numbers = dict.fromkeys(("num_layers", "hidden_size", "vocab_size", "num_kv_heads", "head_dim"), 1)
        return ModelManifest(
            manifest_version=1,
            name="m",
            dtype="float32",
            publication="p",
            architecture="LlamaForCausalLM",
            model_type="llama",
            context_length=64,
            tied=False,
            objects={},
            files=stored,
            **numbers,
        )


def load(**files: Any) -> ModelText:
    folder = Folder(
        {"tokenizer.json": byte_tokenizer().to_str().encode()} | {name.replace("__", "."): data for name, data in files.items()}
    )
    return ModelText.load(folder, folder.manifest())


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    reference = transformers_tokenizer(tmp_path, template)
    expected = reference.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    rendered = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "<|im_end|>"}).render(TURNS, lambda _: None)
    assert rendered == expected


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    reference: PreTrainedTokenizerFast = transformers_tokenizer(tmp_path, CHAT_TEMPLATE)
    text = load(chat_template__jinja=CHAT_TEMPLATE.encode(), tokenizer_config__json={"eos_token": "<|im_end|>"})
    for prompt in TEXTS:
        assert text.encoder.encode(prompt) == reference(prompt)["input_ids"]
    expected = reference.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert text.encode_messages(MESSAGES) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content }}", "refuses"),
        ("{{ messages | length + 'x' }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
    ],
)
def test_an_error_in_a_template_is_an_invalid_request(template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate(template, {}).render(TURNS, lambda _: None)


def test_rendering_stops_when_the_text_becomes_too_long() -> None:
    template = ChatTemplate("{% for m in messages %}{% for n in range(90000) %}{{ m.content }}{% endfor %}{% endfor %}", {})
    rendered: list[int] = []

    class Counting(str):
        def __str__(self) -> str:
            rendered.append(1)
            return self

    def check(characters: int) -> None:
        if characters > 1000:
            raise ContextExceeded

    with pytest.raises(ContextExceeded):
        template.render([{"role": "user", "content": Counting("x" * 100)}], check)
    assert len(rendered) == 11


def test_more_messages_than_tokens_are_not_rendered() -> None:
    text = load(chat_template__jinja=b"{{ raise_exception('rendered') }}")
    with pytest.raises(InvalidRequest, match="your 65 messages have at least a token each"):
        text.encode_messages([Message("user", "")] * 65)
    with pytest.raises(InvalidRequest, match="10000 characters"):
        text.encode_messages([Message("user", "x" * 5000)] * 2)


def test_the_default_template_of_several_is_used() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the"}]
    assert (
        load(tokenizer_config__json={"chat_template": named}).encode_messages(MESSAGES)
        == byte_tokenizer().encode("the").ids[1:]
    )
    assert load(tokenizer_config__json={"chat_template": "th"}).template is not None
    with pytest.raises(InvalidRequest, match="no chat template"):
        load().encode_messages(MESSAGES)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config__json": {"eos_token_id": [2, 4]}, "config__json": {"eos_token_id": 3}}, {2, 4}),
        ({"generation_config__json": {}, "config__json": {"eos_token_id": 3}}, {3}),
        ({"tokenizer_config__json": {"eos_token": {"content": "<|im_end|>"}}}, {4}),
        ({}, set()),
    ],
)
def test_end_tokens_come_from_the_first_file_that_names_them(files: dict[str, Any], expected: set[int]) -> None:
    assert load(**files).eos_ids == expected


def test_other_threads_run_while_many_tokens_are_decoded() -> None:
    tokenizer = llama_2()
    text = ModelText(tokenizer, None, frozenset(), 2**20)
    ids = tokenizer.encode("the", add_special_tokens=False).ids[-1:] * 2**20
    turns = 0
    over = threading.Event()

    def count() -> None:
        nonlocal turns
        while not over.wait(0.001):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    before = turns
    decoded = text.decode(ids)
    seen = turns - before
    over.set()
    other.join()
    assert len(decoded) >= 2**20
    assert seen > 10, "the library held the interpreter lock"
