"""Two gateways before the same stages, every tier on: conversations begin at one and go on at the other, while a stage leaves,
another is killed, and a gateway is killed. Real processes, a real store.

Every answer is the whole model's, token for token. What was found instead of computed is counted, by tier: what a conversation
finds in its next turn, the other gateway has left there.
"""

import json
import random
import signal
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Final

import torch

from eventing.wire.generation import GenerateRequest, GenerateResponse
from eventing.wire.prefix_chain import BLOCK_TOKENS
from knative.local.serving.endpoint_slices import endpoint_slice
from tests.support.functions.functions import FunctionProcess, gateway_environment, running, stage_environment, wait_until
from tests.support.functions.metrics import metric
from tests.support.functions.streams import BrokenStream, answer_of, began
from tests.support.knative.kubernetes_watch import WatchServer
from tests.support.storage.published import CUT, SPECIAL, VOCAB_SIZE, Published

CONVERSATIONS: Final = 6
SHARED_TOKENS: Final = 81
OWN_TOKENS: Final = 4  # of a conversation before each answer
ANSWERS: Final = (12, 12, 40, 40, 40)  # tokens of each turn's answer; during the long ones something goes away
MIDDLE: Final = 1  # the stage whose instances come and go
NAMES: Final = ("leaving", "killed", "spare")  # its instances
SERVICES: Final = tuple(f"stage-{stage}" for stage in range(len(CUT)))
PODS: Final = {"LAMINA_POD_NETWORK": "127.0.0.0/8", "LAMINA_POD_PORT": "0"}


@dataclass(frozen=True)
class Turn:
    """One turn of all conversations."""

    prompts: list[list[int]]
    expected: list[list[int]]  # the whole model's answers

    @property
    def left(self) -> int:
        """Tokens of a conversation that are found in the next turn."""
        return whole_blocks(len(self.prompts[0]) + len(self.expected[0]) - 1)

    def request(self, number: int) -> GenerateRequest:
        return GenerateRequest(tuple(self.prompts[number]), max_tokens=len(self.expected[number]), ignore_eos=True)

    def answers(self, streams: Mapping[int, HTTPResponse]) -> list[GenerateResponse]:
        """All as expected."""
        found = {number: answer_of(stream) for number, stream in streams.items()}
        wrong = [number for number, answer in found.items() if list(answer.token_ids) != self.expected[number]]
        assert not wrong, f"conversations {wrong} are not as the whole model has them"
        return list(found.values())


def turns(published: Published) -> list[Turn]:
    dice = random.Random(12)

    def own(tokens: int) -> list[int]:
        return dice.choices(range(len(SPECIAL), VOCAB_SIZE), k=tokens)

    shared = own(SHARED_TOKENS)
    said = [shared] * CONVERSATIONS
    found = []
    for tokens in ANSWERS:
        prompts = [before + own(OWN_TOKENS) for before in said]
        inputs = torch.tensor(prompts)
        output = published.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False
        ).tolist()
        found.append(Turn(prompts, [whole[len(prompts[0]) :] for whole in output]))
        said = output
    return found


@dataclass
class Pipeline:
    api: WatchServer
    ends: list[FunctionProcess]  # first and last stage
    middle: list[FunctionProcess]  # instances of the stage between them
    gateways: list[FunctionProcess]

    def publish(self, **states: str) -> None:
        """What the watch says of instances of the middle stage, by name: ready, leaving or gone."""
        for name, state in states.items():
            put(self.api, MIDDLE, name, self.middle[NAMES.index(name)], state)
        known = sorted(state for state in states.values() if state != "gone")
        wait_until(lambda: all(states_of(gateway) == known for gateway in self.gateways))

    def idle(self, middle: FunctionProcess) -> None:
        """Waits until what answers held is remembered."""
        wait_until(lambda: sum(metric(stage, "lamina_stage_sequences") for stage in [*self.ends, middle]) == 0)

    def stopped_amid_answers(self) -> bool:
        """Stops the first stage. Whether answers wait for it; on a busy machine all may have ended."""
        self.ends[0].process.send_signal(signal.SIGSTOP)
        running, before = self._running(), -1.0
        while running != before:  # steps that have passed the first stage go on
            time.sleep(0.5)
            running, before = self._running(), running
        return running > 0

    def _running(self) -> float:
        return sum(metric(gateway, "lamina_gateway_running_sequences") for gateway in self.gateways)

    @contextmanager
    def begun(self, turn: Turn, numbers: Sequence[int], swapped: bool = False) -> Iterator[dict[int, HTTPResponse]]:
        """Answers in conversations of even numbers, at one gateway, and of odd ones, at the other, all at the same time."""
        with ExitStack() as stack, ThreadPoolExecutor(CONVERSATIONS) as threads:

            def begin(number: int) -> HTTPResponse:
                gateway = self.gateways[(number + swapped) % 2]
                return stack.enter_context(began(gateway, turn.request(number)))

            yield dict(zip(numbers, threads.map(begin, numbers), strict=True))

    def ask(self, turn: Turn, numbers: Sequence[int], swapped: bool = False) -> list[GenerateResponse]:
        with self.begun(turn, numbers, swapped) as streams:
            return turn.answers(streams)


def put(api: WatchServer, stage: int, name: str, function: FunctionProcess, state: str = "ready") -> None:
    if state == "gone":
        api.delete(f"{name}-private")
        return
    ready = state == "ready"
    service = SERVICES[stage]
    conditions = {"ready": ready, "serving": True, "terminating": not ready}
    api.put(endpoint_slice(service, f"{service}-00001", "default", name, conditions, function.port))


def states_of(gateway: FunctionProcess) -> list[str]:
    """States of the middle stage's instances, as the gateway knows them."""
    with urllib.request.urlopen(gateway.url + "/v1/pipeline/events", timeout=30) as stream:
        line = next(line for line in stream if line.startswith(b"data:"))
    replicas = json.loads(line.removeprefix(b"data:"))["stages"][str(MIDDLE)]["replicas"]
    return sorted(replica["state"] for replica in replicas.values())


@contextmanager
def two_gateways(published: Published) -> Iterator[Pipeline]:
    kept = {"LAMINA_KV_STORE": f"{published.store.bucket}/kv", "LAMINA_KV_KEY": "ab" * 32}
    stages = [stage_environment(published, group, **PODS, **kept) for group in (0, 2, MIDDLE, MIDDLE, MIDDLE)]
    with WatchServer() as api, running(stages) as (first, last, *middle):
        put(api, 0, "first", first)
        put(api, 2, "last", last)
        put(api, MIDDLE, NAMES[0], middle[0])
        watched = PODS | {
            "LAMINA_KUBERNETES_API": api.url,
            "LAMINA_STAGE_SERVICES": ",".join(SERVICES),
            "LAMINA_DRAFT_TOKENS": "0",
            "LAMINA_PREFIX_SHARING": "pipeline",
        }
        urls = [first.url, middle[0].url, last.url]
        with running([gateway_environment(published, urls, **watched)] * 2) as gateways:
            yield Pipeline(api, [first, last], middle, gateways)


def found(stage: FunctionProcess, tier: str) -> float:
    """Tokens that were read from there."""
    return metric(stage, rf'lamina_stage_kv_tokens_total\{{tier="{tier}"\}}')


def cached(answers: Sequence[GenerateResponse]) -> list[int]:
    return [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]


def replays(answers: Sequence[GenerateResponse]) -> int:
    return sum(answer.timings.replays for answer in answers)


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def breaks(stream: HTTPResponse) -> bool:
    try:
        answer_of(stream)
    except BrokenStream:
        return True
    return False


def test_conversations_go_on_at_the_other_gateway_whatever_goes_away(published: Published) -> None:
    first, second, third, fourth, fifth = turns(published)
    everybody = range(CONVERSATIONS)
    with two_gateways(published) as pipeline:
        leaving, killed, spare = pipeline.middle

        assert replays(pipeline.ask(first, everybody)) == 0
        pipeline.idle(leaving)
        answers = pipeline.ask(second, everybody, swapped=True)
        assert replays(answers) == 0
        assert set(cached(answers)) == {first.left}, "all that the other gateway left"
        pipeline.idle(leaving)

        with pipeline.begun(third, everybody[:4]) as streams:
            pipeline.publish(leaving="leaving", killed="ready")
            third.answers(streams)
        answers = pipeline.ask(third, everybody[4:])
        assert set(cached(answers)) == {second.left}, "read from the instance that leaves"
        assert found(killed, "peer") > 0
        pipeline.idle(killed)
        leaving.stop()
        pipeline.publish(leaving="gone", killed="ready")

        with pipeline.begun(fourth, everybody, swapped=True) as streams:
            amid = pipeline.stopped_amid_answers()
            killed.process.kill()
            pipeline.ends[0].process.send_signal(signal.SIGCONT)
            pipeline.publish(killed="gone", spare="ready")
            answers = fourth.answers(streams)
        assert set(cached(answers)) == {third.left}
        assert replays(answers) > 0 or not amid
        assert found(spare, "store") > 0
        pipeline.idle(spare)

        gone, stays = pipeline.gateways
        with pipeline.begun(fifth, everybody) as streams:
            gone.process.send_signal(signal.SIGSTOP)
            fifth.answers({number: streams[number] for number in everybody[1::2]})
            amid = metric(spare, "lamina_stage_sequences") > 0
            gone.process.kill()
            assert any(breaks(streams[number]) for number in everybody[::2]) or not amid
        pipeline.gateways = [stays, stays]
        answers = pipeline.ask(fifth, everybody[::2])
        assert set(cached(answers)) == {whole_blocks(len(fifth.prompts[0]) - 1)}, "the gateway that is gone computed it"
