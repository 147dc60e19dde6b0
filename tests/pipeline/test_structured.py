"""Structured answers keep their structure and their tokens while stages are killed."""

import asyncio
import json
from pathlib import Path
from typing import Final

from knative.render.services import services
from tests.support.functions.killing import TIMING, killing
from tests.support.functions.served import serving, tiny_pipeline
from tests.support.functions.structured_cases import Ended, ask_all, case
from tests.support.storage.published import Published

NUMBERS: Final = range(16)
MAX_TOKENS: Final = 150
DEADLINE_SECONDS: Final = 150.0


def test_cases_repeat_and_differ_and_wrong_answers_do_not_fit() -> None:
    assert [case(number).options for number in range(40)] == [case(number).options for number in range(40)]
    assert len({json.dumps(case(number).options) for number in range(200)}) > 150
    for number in range(16):
        assert not case(number).fits('{"nothing": "of the kind"}')
        assert not Ended(number, "", "stop", 1).fits
        assert Ended(number, "", "length", 1).fits


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
