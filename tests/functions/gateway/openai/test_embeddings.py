"""The official client asks a gateway over three stages, each a process, for vectors and scores. The oracle is transformers."""

import base64
import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray

from tests.support.functions.functions import FunctionProcess, running_gateway, running_stages
from tests.support.storage.embedders import (
    TinyEmbedder,
    published_embedder,
    save_classifier,
    save_gemma_embedder,
    save_qwen_embedder,
)
from tests.support.storage.published import CONFIG, Published

TEXTS = ["The capital of France is Paris.", "no", "the the the" * 20]
WITHIN = 1e-5
Vector = NDArray[np.float64]


@pytest.fixture(scope="module")
def client(gateway: FunctionProcess) -> Iterator[openai.OpenAI]:
    with client_of(gateway) as client:
        yield client


@contextmanager
def client_of(gateway: FunctionProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def hidden_states(model: Any, ids: list[int]) -> Vector:
    with torch.inference_mode():
        states: Vector = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].double().numpy()
    return states


def unit(vector: Vector) -> Vector:
    result: Vector = vector / np.linalg.norm(vector)
    return result


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_model_of_text_makes_vectors(client: openai.OpenAI, published: Published, pooling: str) -> None:
    """By default of the last token. The longest text takes several chunks."""
    more = {} if pooling == "last" else {"extra_body": {"pooling": pooling}}
    found = client.embeddings.create(model="tiny", input=TEXTS, **more)  # type: ignore[arg-type]
    ids = [published.tokenizer.encode(text).ids for text in TEXTS]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    for each, own in zip(found.data, ids, strict=True):
        states = hidden_states(published.model.model, own)
        expected = unit(states[-1] if pooling == "last" else states.mean(0))
        assert np.abs(np.array(each.embedding) - expected).max() < WITHIN
    assert [each.index for each in found.data] == [0, 1, 2]


def test_vectors_by_events_are_those_of_the_api(gateway: FunctionProcess, client: openai.OpenAI) -> None:
    """A reply above 64 KiB is in the store."""

    def send(**body: Any) -> httpx.Response:
        headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/me", "ce-type": "dev.lamina.embed.request"}
        return httpx.post(f"{gateway.url}/", json=body, headers=headers, timeout=120)

    reply = send(model="tiny", input=TEXTS, encoding_format="float")
    assert (reply.status_code, reply.headers["ce-type"], reply.headers["ce-causationid"]) == (
        200,
        "dev.lamina.embed.response",
        "1",
    )
    expected = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for found, own in zip(reply.json()["data"], expected.data, strict=True):
        assert found["embedding"] == pytest.approx(own.embedding, abs=1e-6)
    assert reply.json()["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    large = send(model="tiny", input=[f"{number}" for number in range(160)])
    assert large.headers["ce-dataref"].startswith("s3://")
    assert not large.content
    assert send(model="other", input="x").status_code == 404
    assert send(model="tiny", input="x", dimensions=4).json()["type"] == "urn:lamina:problem:invalid-request"


def test_inputs_and_formats_of_the_api(client: openai.OpenAI, published: Published) -> None:
    ids = [published.tokenizer.encode(text).ids for text in TEXTS]
    texts = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert client.embeddings.create(model="tiny", input=ids).data[2].embedding == pytest.approx(texts.data[2].embedding)
    one = client.embeddings.create(model="tiny", input=ids[0])
    assert one.data[0].embedding == pytest.approx(texts.data[0].embedding, abs=1e-6)
    raw = client.embeddings.with_raw_response.create(model="tiny", input=TEXTS[0], encoding_format="base64")
    coded = json.loads(raw.content)["data"][0]["embedding"]
    assert list(array("f", base64.b64decode(coded))) == pytest.approx(texts.data[0].embedding, abs=1e-6)
    plain = client.embeddings.create(model="tiny", input=TEXTS[0], extra_body={"normalize": False})
    states = hidden_states(published.model.model, ids[0])
    assert np.abs(np.array(plain.data[0].embedding) - states[-1]).max() < WITHIN * np.abs(states[-1]).max()


def test_many_texts_of_one_request(client: openai.OpenAI) -> None:
    texts = [f"text number {number}" for number in range(300)]
    found = client.embeddings.create(model="tiny", input=texts)
    assert len({tuple(each.embedding) for each in found.data}) == 300
    again = client.embeddings.create(model="tiny", input=[texts[7], texts[299]])
    assert [each.embedding for each in again.data] == [found.data[7].embedding, found.data[299].embedding]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": ["a", [1]]}, "mixes"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a" * 300}, "context"),
        ({"input": [10_000]}, "vocabulary"),
        ({"input": []}, "input"),
    ],
)
def test_what_cannot_be_served_is_refused(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.embeddings.create(model="tiny", **fields)


def test_a_text_is_truncated_if_asked(client: openai.OpenAI) -> None:
    long = client.embeddings.create(model="tiny", input="a" * 300, extra_body={"truncate_prompt_tokens": -1})
    assert long.usage.prompt_tokens == CONFIG["max_position_embeddings"]


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


def test_texts_are_scored_and_ranked_by_their_vectors(gateway: FunctionProcess, client: openai.OpenAI) -> None:
    vectors = [np.array(each.embedding) for each in client.embeddings.create(model="tiny", input=TEXTS).data]
    expected = [float(vectors[0] @ other) for other in vectors]
    for prefix in ("", "/v1"):
        scored = httpx.post(f"{gateway.url}{prefix}/score", json={"model": "tiny", "text_1": TEXTS[0], "text_2": TEXTS}).json()
        assert [each["score"] for each in scored["data"]] == pytest.approx(expected, abs=1e-5)
    ranked = httpx.post(
        f"{gateway.url}/v1/rerank",
        json={"model": "tiny", "query": TEXTS[0], "documents": [{"text": TEXTS[1]}, *TEXTS], "top_n": 2},
    ).json()
    assert ranked["results"][0]["index"] == 1
    assert ranked["results"][0]["document"] == {"text": TEXTS[0]}
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1)
    assert len(ranked["results"]) == 2


@contextmanager
def running_embedder(folder: Path, save: Callable[[Path], Any]) -> Iterator[tuple[TinyEmbedder, FunctionProcess]]:
    with (
        published_embedder(folder, save) as embedder,
        running_stages(embedder.published) as stages,
        running_gateway(embedder.published, stages, LAMINA_CHUNK_TOKENS="16") as gateway,
    ):
        yield embedder, gateway


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TinyEmbedder, FunctionProcess]]:
    with running_embedder(tmp_path_factory.mktemp("gemma"), save_gemma_embedder) as running:
        yield running


def test_an_embedder_that_attends_both_ways(gemma: tuple[TinyEmbedder, FunctionProcess]) -> None:
    """Windows to both sides, a mean, dense layers, normalized; texts longer than the chunks of other models."""
    embedder, gateway = gemma
    texts = [*TEXTS, "x" * 100, *(f"{number} " * number for number in range(1, 24))]
    with client_of(gateway) as client:
        found = client.embeddings.create(model="tiny", input=texts)
        short = client.embeddings.create(model="tiny", input=texts[0], dimensions=8)
        with pytest.raises(openai.BadRequestError, match="shortened to: 16, 8"):
            client.embeddings.create(model="tiny", input=texts[0], dimensions=9)
        with pytest.raises(openai.BadRequestError, match="128 tokens"):
            client.embeddings.create(model="tiny", input="x" * 200)
        with pytest.raises(openai.BadRequestError, match="trained for mean"):
            client.embeddings.create(model="tiny", input="x", extra_body={"pooling": "last"})
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
    for text, each in zip(texts, found.data, strict=True):
        expected = embedder.vector(embedder.published.tokenizer.encode(text).ids, "mean").double().numpy()
        assert np.abs(np.array(each.embedding) - unit(expected)).max() < WITHIN, text
    expected = embedder.vector(embedder.published.tokenizer.encode(texts[0]).ids, "mean").double().numpy()
    assert np.abs(np.array(short.data[0].embedding) - unit(expected[:8])).max() < WITHIN


@pytest.mark.slow
def test_an_embedder_of_the_last_token(tmp_path: Path) -> None:
    with running_embedder(tmp_path, save_qwen_embedder) as (embedder, gateway), client_of(gateway) as client:
        found = client.embeddings.create(model="tiny", input=TEXTS, dimensions=20)
        for text, each in zip(TEXTS, found.data, strict=True):
            expected = embedder.vector(embedder.published.tokenizer.encode(text).ids, "last").double().numpy()
            assert np.abs(np.array(each.embedding) - unit(expected[:20])).max() < WITHIN


@pytest.mark.slow
def test_a_classifier_of_pairs(tmp_path: Path) -> None:
    with running_embedder(tmp_path, save_classifier) as (classifier, gateway):
        expected = []
        for text in TEXTS:
            ids = torch.tensor([classifier.published.tokenizer.encode(TEXTS[0], text).ids])
            with torch.inference_mode():
                expected.append(float(torch.sigmoid(classifier.model(ids).logits[0, 0])))
        scored = httpx.post(f"{gateway.url}/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()
        assert [each["score"] for each in scored["data"]] == pytest.approx(expected, abs=WITHIN)
        ranked = httpx.post(f"{gateway.url}/rerank", json={"query": TEXTS[0], "documents": TEXTS}).json()
        order = sorted(range(len(TEXTS)), key=lambda number: -expected[number])
        assert [each["index"] for each in ranked["results"]] == order
        with client_of(gateway) as client, pytest.raises(openai.BadRequestError, match="/v1/score"):
            client.embeddings.create(model="tiny", input="a")
