"""Pods from zero: right answers, honest phases, fresh nonces, weights out of the cache the second time."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import torch

from eventing.wire.generation import GenerateResponse
from functions.hosting.startup import PHASES
from knative.commands.ask import Question, stream_answer
from tests.support.knative.cold_pipeline import cold_pipeline, pods_of
from tests.support.storage.published import CUT, Published, until_end
from tests.support.storage.storage import FaultProxy
from tests.support.storage.tiny_models import greedy

DEADLINE_SECONDS = 90.0
PROMPT = "hello"


async def cold_answer(
    published: Published, proxy: FaultProxy, folder: Path, cache: Path | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """To a question with everything at zero; and what the stages' readiness said."""
    endpoints = dict.fromkeys(range(len(CUT)), proxy.settings.endpoint_url)
    async with cold_pipeline(published, folder, endpoints, cache) as (platform, local):
        url = platform.url(local.pipeline.spec.name)
        *_, answer = [each async for each in stream_answer(url, Question(PROMPT, 8, chat=False))]
        assert isinstance(answer, GenerateResponse)
        pods = [pods_of(platform, local.pipeline.stage_name(index)) for index in range(len(CUT))]
    assert [len(each) for each in pods] == [1] * len(CUT)
    return answer.text, [each[0]["readiness"] for each in pods]


def run(answer: Coroutine[Any, Any, tuple[str, list[dict[str, Any]]]]) -> tuple[str, list[dict[str, Any]]]:
    return asyncio.run(asyncio.wait_for(answer, DEADLINE_SECONDS))


def layers_read(proxy: FaultProxy) -> int:
    return sum("layer-" in path for _, path in proxy.requests)


def test_phases_follow_one_another(published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    text, said = run(cold_answer(published, proxy, tmp_path))
    with torch.inference_mode():
        ids = greedy(published.model, published.tokenizer.encode(PROMPT).ids, 8)
    assert text == published.tokenizer.decode(until_end(ids))
    for each in said:
        phases = each["start_up"]
        assert phases.keys() == set(PHASES)
        assert 0 <= phases["process"] <= phases["import"] <= phases["place"] <= phases["warm_up"]
        assert phases["connect"] <= phases["first_byte"] <= phases["last_byte"] <= phases["place"]
    assert len({each["instance"].rpartition("-")[2] for each in said}) == len(CUT)


def test_the_second_start_reads_no_weights(published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    cache = tmp_path / "weights"
    first, _ = run(cold_answer(published, proxy, tmp_path, cache))
    assert layers_read(proxy) >= 6
    proxy.requests.clear()
    second, said = run(cold_answer(published, proxy, tmp_path, cache))
    assert second == first
    assert layers_read(proxy) == 0
    assert all(each["start_up"].keys() == set(PHASES) for each in said)


def test_what_was_altered_in_the_cache_is_read_again(published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    cache = tmp_path / "weights"
    first, _ = run(cold_answer(published, proxy, tmp_path, cache))
    for file in cache.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    proxy.requests.clear()
    second, _ = run(cold_answer(published, proxy, tmp_path, cache))
    assert second == first
    assert layers_read(proxy) >= 6
