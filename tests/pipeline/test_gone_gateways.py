"""Gateways that are killed or paused, real processes all: what they held is free soon, and no answer is wrong."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

from eventing.wire.control import LEASE_SECONDS
from eventing.wire.generation import GenerateRequest
from tests.support.functions.functions import FunctionProcess, gateway_environment, running, running_stages, wait_until
from tests.support.functions.metrics import metric
from tests.support.functions.streams import answer_of, began
from tests.support.storage.published import Published

PROMPT = "The capital of France is"
LONG_TOKENS = 200
SHORT_TOKENS = 5
FREED_SECONDS = LEASE_SECONDS + 10.0  # the ten are for a busy machine


def test_a_killed_gateway_frees_what_it_held_and_a_paused_one_answers_right(published: Published) -> None:
    expected = published.expected(PROMPT, LONG_TOKENS)
    assert len(expected) > 50, "long enough to be killed or paused in its midst"
    with running_stages(published) as stages:
        capacity = free(stages)
        environ = gateway_environment(published, [stage.url for stage in stages])
        with running([environ] * 3) as (killed, paused, honest), ThreadPoolExecutor(1) as honest_client:
            with began(killed, request(LONG_TOKENS)), began(paused, request(LONG_TOKENS)) as answer:
                killed.process.send_signal(signal.SIGKILL)
                paused.process.send_signal(signal.SIGSTOP)
                ends = time.monotonic() + FREED_SECONDS
                asked = honest_client.submit(keep_asking, honest, ends, expected[:SHORT_TOKENS])
                killed.process.wait(10)
                assert held(stages) >= 2 * len(stages)
                asked.result()
                wait_until(lambda: held(stages) == 0, 5)  # the last answer's release may be on its way
                assert free(stages) == capacity
                paused.process.send_signal(signal.SIGCONT)
                assert list(answer_of(answer).token_ids) == expected
            wait_until(lambda: free(stages) == capacity)
            assert metric(honest, "lamina_gateway_replays_total") == 0


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(PROMPT, max_tokens=max_tokens)


def keep_asking(gateway: FunctionProcess, until: float, expected: list[int]) -> None:
    while time.monotonic() < until:
        with began(gateway, request(len(expected))) as stream:
            assert list(answer_of(stream).token_ids) == expected


def held(stages: list[FunctionProcess]) -> float:
    return sum(metric(stage, "lamina_stage_sequences") for stage in stages)


def free(stages: list[FunctionProcess]) -> list[float]:
    return [metric(stage, "lamina_stage_free_tokens") for stage in stages]
