"""Structured answers keep their structure and their tokens while stages are killed.

`python -m bench.structured` does the same with 200 answers of the default model.
"""

import asyncio
from pathlib import Path
from typing import Final

from bench.structured.asking import Ended, ask_all
from knative.render.services import services
from tests.support.functions.killing import TIMING, killing
from tests.support.functions.served import serving, tiny_pipeline
from tests.support.storage.published import Published

NUMBERS: Final = range(16)
MAX_TOKENS: Final = 150
DEADLINE_SECONDS: Final = 150.0


def test_structured_answers_survive_killed_stages(published: Published, tmp_path: Path) -> None:
    killed, alone = asyncio.run(_both(tmp_path, published))
    assert killed == alone, "a replay gave other answers"
    wrong = [answer for answer in alone.values() if not answer.fits]
    assert not wrong, wrong
    assert sum(answer.finish_reason == "stop" for answer in alone.values()) >= len(NUMBERS) - 2, alone


async def _both(folder: Path, published: Published) -> tuple[dict[int, Ended], dict[int, Ended]]:
    """Answers while stages are killed, then answers without that."""
    pipeline = tiny_pipeline(published)
    killed: dict[int, Ended] = {}
    alone: dict[int, Ended] = {}
    async with serving(folder, published, services(pipeline), TIMING) as platform, asyncio.timeout(DEADLINE_SECONDS):
        asking = ask_all(platform.url("tiny"), "tiny", NUMBERS, MAX_TOKENS, killed)
        killer = await killing(platform, pipeline, asking, killed)
        await ask_all(platform.url("tiny"), "tiny", NUMBERS, MAX_TOKENS, alone)
    assert killer.kills_that_cost >= 1, killer.replays
    return killed, alone
