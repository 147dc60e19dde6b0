"""Pods from zero: right answers, honest phases, fresh nonces, weights out of the cache the second time."""

import asyncio
from pathlib import Path
from typing import Any

from functions.hosting.startup import PHASES
from tests.support.functions.served import answer_to
from tests.support.knative.cold_pipeline import cold_pipeline, pods_of
from tests.support.storage.published import CUT, Published
from tests.support.storage.storage import FaultProxy

DEADLINE_SECONDS = 90.0
PROMPT = "hello"


async def ask_cold(
    published: Published, proxy: FaultProxy, folder: Path, cache: Path | None
) -> tuple[str, list[dict[str, Any]]]:
    endpoints = dict.fromkeys(range(len(CUT)), proxy.settings.endpoint_url)
    async with cold_pipeline(published, folder, endpoints, cache) as (platform, local):
        answer = await answer_to(platform.url(local.pipeline.spec.name), PROMPT, 8)
        pods = [pods_of(platform, local.pipeline.stage_name(index)) for index in range(len(CUT))]
    assert [len(each) for each in pods] == [1] * len(CUT)
    return answer.text, [each[0]["readiness"] for each in pods]


def cold_answer(
    published: Published, proxy: FaultProxy, folder: Path, cache: Path | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """The answer to a question that is asked with everything at zero, and what the stages' readiness said."""
    return asyncio.run(asyncio.wait_for(ask_cold(published, proxy, folder, cache), DEADLINE_SECONDS))


def layers_read(proxy: FaultProxy) -> int:
    return sum("layer-" in path for _, path in proxy.requests)


def test_phases_follow_one_another(published: Published, proxy: FaultProxy, tmp_path: Path) -> None:
    text, said = cold_answer(published, proxy, tmp_path)
    assert text == published.tokenizer.decode(published.expected(PROMPT, 8))
    for each in said:
        phases = each["start_up"]
        assert phases.keys() == set(PHASES)
        assert 0 <= phases["process"] <= phases["import"] <= phases["place"] <= phases["warm_up"]
        assert phases["connect"] <= phases["first_byte"] <= phases["last_byte"] <= phases["place"]
    assert len({each["instance"].rpartition("-")[2] for each in said}) == len(CUT)


def test_a_second_start_reads_no_weights_but_those_that_were_altered_in_the_cache(
    published: Published, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = tmp_path / "weights"
    first, _ = cold_answer(published, proxy, tmp_path, cache)
    assert layers_read(proxy) >= 6
    proxy.requests.clear()
    second, said = cold_answer(published, proxy, tmp_path, cache)
    assert second == first
    assert layers_read(proxy) == 0
    assert all(each["start_up"].keys() == set(PHASES) for each in said)
    for file in cache.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    third, _ = cold_answer(published, proxy, tmp_path, cache)
    assert third == first
    assert layers_read(proxy) >= 6
