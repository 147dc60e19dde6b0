"""The real model through real processes and HTTP: the same tokens as the whole model in transformers, whatever the cut.

The oracle reads the GGUF file itself, by transformers' own means; nothing of what Lamina published is in it. In fp32 a token
may differ only where the whole model's two best logits of that step are closer than 1e-3: batching moves them by up to 6e-5.
"""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from eventing.wire.events import Cut
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import ModelShape, published_shape
from storage.models.model_repository import read_file
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.functions.functions import gateway_environment, running, stage_environment
from tests.support.storage.published import Published
from tests.support.storage.storage import default_model_gguf
from tests.support.storage.torch_tensors import reading_gguf_once

CLOSE_LOGITS = 1e-3
NEW_TOKENS = 16

PROMPTS: list[Any] = [
    "The capital of France is",
    "Once upon a time",
    "a",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    "The year 1969 and the number 31415926535 have",
    "In 2023, the population of 12 cities was 1,234,567.89 in total; by 2030 it",
    "Wasser kocht bei hundert Grad und gefriert bei",
    "La tour Eiffel se trouve à",
    "Москва - столица",
    "東京は日本の",
    "日本語と English を混ぜた文章では",
    "العربية لغة",
    "नमस्ते दुनिया",
    "😀 emoji and accents: café, naïve, Zürich —",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, count(*) FROM users WHERE",
    '{"name": "Ada", "born": 1815, "language":',
    "The quick brown fox jumps over the lazy dog. " * 30 + "After that, the fox",
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Name a colour."}],
]  # short, long, digits, several scripts, code; lists are chats


@dataclass(frozen=True)
class RealModel:
    published: Published
    shape: ModelShape

    def cut(self, stages: int) -> Cut:
        return cut_evenly(self.shape, stages)


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealModel]:
    folder = tmp_path_factory.mktemp("exactness")
    gguf = default_model_gguf()
    with EmbeddedStore(folder / "store") as embedded:
        store = ObjectStore(embedded.settings)
        manifest = publish(gguf, store, "smollm2", "float32")
        tokenizer = Tokenizer.from_str(read_file(store, manifest, "tokenizer.json").decode())
        published = Published(embedded.settings, manifest, partial(_load, gguf), tokenizer)
        yield RealModel(published, published_shape(store, manifest))


def _load(gguf: Path) -> PreTrainedModel:
    with reading_gguf_once():
        return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(wide: bool) -> list[Any]:
    return PROMPTS if wide else PROMPTS[1::2]


@pytest.fixture(scope="module")
def expected(real_model: RealModel, prompts: list[Any]) -> list[list[int]]:
    """Greedy tokens of the whole model, by prompt."""
    return [generate(real_model.published.model, prompt_ids(real_model.published, prompt)) for prompt in prompts]


def prompt_ids(published: Published, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return published.tokenizer.encode(prompt).ids
    return published.tokenizer.encode(chatml(prompt), add_special_tokens=False).ids


def chatml(messages: list[dict[str, str]]) -> str:
    """The model's template, written out by hand."""
    if messages[0]["role"] != "system":
        messages = [
            {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
            *messages,
        ]
    turns = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    return f"{turns}<|im_start|>assistant\n"


def generate(model: PreTrainedModel, ids: list[int]) -> list[int]:
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: list[int] = output[0][len(ids) :].tolist()
    return tokens


def ask(url: str, prompt: Any, **parameters: Any) -> dict[str, Any]:
    data = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    body = json.dumps(data | {"max_tokens": NEW_TOKENS} | parameters).encode()
    headers = {
        "ce-specversion": "1.0",
        "ce-id": str(id(body)),
        "ce-source": "/tests",
        "ce-type": "dev.lamina.generate.request",
        "content-type": "application/json",
    }
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def assert_same(published: Published, prompt: Any, seen: list[int], wanted: list[int]) -> None:
    """seen: without the end-of-sequence token that transformers' output has."""
    ends = {published.tokenizer.token_to_id(end) for end in ("<|im_end|>", "<|endoftext|>")}
    wanted = [token for token in wanted if token not in ends]
    for step, (one, other) in enumerate(zip(seen, wanted, strict=False)):
        if one != other:
            assert is_close(published, prompt, wanted[:step]), f"{prompt!r}: {seen} instead of {wanted} from token {step} on"
            return
    assert len(seen) == len(wanted), f"{prompt!r}: {seen} instead of {wanted}"


def is_close(published: Published, prompt: Any, so_far: list[int]) -> bool:
    with torch.inference_mode():
        logits = published.model(torch.tensor([prompt_ids(published, prompt) + so_far])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return bool(best - second < CLOSE_LOGITS)


def answers(real_model: RealModel, stages: int, requests: list[tuple[Any, dict[str, Any]]], at_once: int) -> list[list[int]]:
    """Token ids of each answer, from a pipeline of so many stage processes."""
    published, cut = real_model.published, real_model.cut(stages)
    memory = {"LAMINA_KV_CACHE_BYTES": str(128 * 2**20 // stages), "OMP_NUM_THREADS": "1"}
    with running(stage_environment(published, group, cut, **memory) for group in range(stages)) as functions:
        environ = gateway_environment(published, [function.url for function in functions], cut)
        with running([environ]) as (gateway,), ThreadPoolExecutor(at_once) as pool:
            replies = list(pool.map(lambda each: ask(gateway.url, each[0], **each[1]), requests))
    assert all(reply["timings"]["replays"] == 0 for reply in replies)
    return [reply["token_ids"] for reply in replies]


@pytest.fixture(scope="module")
def sampled() -> dict[int, list[list[int]]]:
    """By number of stages: what was drawn."""
    return {}


@pytest.mark.parametrize("stages", [1, 3, pytest.param(5, marks=pytest.mark.wide)])
def test_prompts_give_the_whole_models_tokens(
    real_model: RealModel, prompts: list[Any], expected: list[list[int]], sampled: dict[int, list[list[int]]], stages: int
) -> None:
    greedy = [(prompt, {}) for prompt in prompts]
    drawn = [(prompt, {"temperature": 1, "seed": 7, "max_tokens": 24}) for prompt in (PROMPTS[1], PROMPTS[14], PROMPTS[18])]
    seen = answers(real_model, stages, [*greedy, *drawn, *drawn], at_once=5)
    for prompt, tokens, wanted in zip(prompts, seen, expected, strict=False):
        assert_same(real_model.published, prompt, tokens, wanted)
    first, again = seen[len(greedy) : len(greedy) + len(drawn)], seen[len(greedy) + len(drawn) :]
    assert first == again, "the same request and seed, twice"
    assert len({tuple(tokens) for tokens in first}) == len(drawn)
    sampled[stages] = first
    assert len({json.dumps(each) for each in sampled.values()}) == 1, f"draws depend on the cut: {sampled}"


@pytest.mark.wide
def test_a_stage_for_each_layer(real_model: RealModel, prompts: list[Any], expected: list[list[int]]) -> None:
    chosen = [0, 4]
    seen = answers(real_model, real_model.shape.num_layers, [(prompts[index], {}) for index in chosen], at_once=2)
    for index, tokens in zip(chosen, seen, strict=True):
        assert_same(real_model.published, prompts[index], tokens, expected[index])
