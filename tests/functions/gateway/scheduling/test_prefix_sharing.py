"""Cached prefixes are found, and answers are the same, token for token, as without a prefix cache."""

import random

import msgspec
import pytest

from eventing.wire.control import ReleaseRequest, ReserveRequest
from eventing.wire.events import EventType, Sampling
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Endpoint, Placement
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.kv_stages import native_stage
from tests.support.functions.stage_server import StageServer, counting_stages, running
from tests.support.storage import tiny_models

DTYPES = ("float32", "bfloat16", "int8", "q4")
NEW_TOKENS = 12
PENALIZED = Sampling(temperature=1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.5)


def text(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB_SIZE), k=tokens)


def talk(scheduler: Scheduler, stages: list[StageServer], sampling: Sampling) -> tuple[list[list[int]], list[TokenStream]]:
    """Three turns of a conversation, each after the memory of the last one is released."""
    tokens, answers, streams = text(1, 70), [], []
    for turn in range(3):
        streams.append(submit(scheduler, tokens, NEW_TOKENS, sampling=sampling))
        answers.append(tokens_of(streams[-1]))
        nothing_left(stages)
        tokens = [*tokens, *answers[-1], *text(2 + turn, 20)]
    return answers, streams


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", [Sampling(), PENALIZED])
def test_a_follow_up_computes_only_new_tokens(dtype: str, sampling: Sampling) -> None:
    with running(native_stage(dtype), 3) as stages:
        with scheduling(stages, chunk_tokens=32, sharing="off") as scheduler:
            expected, streams = talk(scheduler, stages, sampling)
            assert [stream.cached_tokens for stream in streams] == [0, 0, 0]
        with scheduling(stages, chunk_tokens=32, draft_tokens=4) as scheduler:
            answers, streams = talk(scheduler, stages, sampling)
            assert answers == expected
            known = [0, *((70 + turn * (NEW_TOKENS + 20) + NEW_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS for turn in range(2))]
            assert [stream.cached_tokens for stream in streams] == known
            assert scheduler.stats().cached_tokens == sum(known)
        nothing_left(stages)


@pytest.mark.parametrize("dtype", ["float32", "q4"])
def test_prompts_that_arrive_together_compute_their_common_prefix_once(dtype: str) -> None:
    common, own, number = 100, 9, 12
    prompts = [text(1, common) + text(10 + index, own) for index in range(number)]
    with running(native_stage(dtype), 3) as stages:
        with scheduling(stages, chunk_tokens=32, sharing="off") as scheduler:
            expected = [tokens_of(submit(scheduler, prompt, NEW_TOKENS)) for prompt in prompts]
            nothing_left(stages)
        with scheduling(stages, chunk_tokens=32, micro_batch_sequences=4) as scheduler:
            streams = [submit(scheduler, prompt, NEW_TOKENS) for prompt in prompts]
            assert [tokens_of(stream) for stream in streams] == expected
            shared = common // BLOCK_TOKENS * BLOCK_TOKENS
            assert sorted(stream.cached_tokens for stream in streams) == [0, *[shared] * (number - 1)]
            assert scheduler.stats().prompt_tokens == common + own + (number - 1) * (common + own - shared)
        nothing_left(stages)


def test_followers_of_a_cancelled_leader_use_what_it_computed() -> None:
    prompts = [text(1, 150) + text(10 + index, 5) for index in range(6)]
    with running(native_stage("float32"), 3) as stages, scheduling(stages, chunk_tokens=32) as scheduler:
        for stage in stages:
            stage.seconds = 0.02
        streams = [submit(scheduler, prompt, NEW_TOKENS) for prompt in prompts]
        wait_until(lambda: len(stages[-1].passes) >= 2, "the first chunks")
        streams[0].cancel()
        assert all(len(tokens_of(stream)) == NEW_TOKENS for stream in streams[1:])
        assert sum(stream.cached_tokens for stream in streams) >= 4 * 144
        assert scheduler.stats().prompt_tokens < 2 * 160 + 5 * 40


def test_no_sequence_follows_if_stages_have_no_prefix_cache() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=32, micro_batch_sequences=4) as scheduler:
        streams = [submit(scheduler, [*[1] * 100, number], 2) for number in range(4)]
        assert all(len(tokens_of(stream)) == 2 for stream in streams)
        assert scheduler.stats().prompt_tokens == 4 * 101
        assert sum(seen.type == EventType.RESERVE for stage in stages for seen in stage.seen) <= 3 * 4
        nothing_left(stages)


@pytest.mark.parametrize(("sharing", "found"), [("pipeline", True), ("client", False), ("off", False)])
def test_another_client_finds_a_prefix_if_all_share(sharing: str, found: bool) -> None:
    prompt = text(1, 80)
    with running(native_stage("float32"), 3) as stages, scheduling(stages, sharing=sharing) as scheduler:
        streams = []
        for client_id in ("one", "other", "one"):
            streams.append(submit(scheduler, prompt, 2, client_id=client_id))
            tokens_of(streams[-1])
        assert [bool(stream.cached_tokens) for stream in streams] == [False, found, sharing != "off"]


@pytest.mark.parametrize("sharing", ["request", "client", "pipeline"])
def test_only_requests_with_the_same_salt_share_with_one_that_has_a_salt(sharing: str) -> None:
    prompt, salts = text(1, 80), ("mine", "", "another", "mine")
    with running(native_stage("float32"), 3) as stages, scheduling(stages, sharing=sharing) as scheduler:
        streams = [submit(scheduler, prompt, 2, cache_salt="mine")]
        tokens_of(streams[0])
        for salt in salts:
            streams.append(submit(scheduler, prompt, 2, cache_salt=salt))
            tokens_of(streams[-1])
        assert [bool(stream.cached_tokens) for stream in streams[1:]] == [True, False, False, True]


def test_the_answers_of_one_request_share_its_prompt_and_the_next_request_shares_nothing() -> None:
    with running(native_stage("float32"), 3) as stages, scheduling(stages, sharing="request", chunk_tokens=32) as scheduler:
        prompt = text(1, 80)
        for secret in ("one", "other"):
            streams = [
                submit(scheduler, prompt, 2, request_secret=secret, is_only_answer=False, request_id="chosen") for _ in range(3)
            ]
            assert all(len(tokens_of(stream)) == 2 for stream in streams)
            assert sorted(stream.cached_tokens for stream in streams) == [0, 64, 64]
            nothing_left(stages)


def test_what_nobody_may_find_does_not_stay_in_prefix_caches() -> None:
    with running(native_stage("float32"), 3) as stages, scheduling(stages, sharing="request") as scheduler:
        tokens_of(submit(scheduler, text(1, 80), 2))
        tokens_of(submit(scheduler, text(1, 80), 2, cache_salt="mine"))
        nothing_left(stages)
        released = [
            row.chain
            for seen in stages[0].seen
            if seen.type == EventType.RELEASE
            for row in msgspec.json.decode(seen.body, type=ReleaseRequest).rows
        ]
        assert [bool(chain) for chain in released] == [False, True]


def test_a_stage_that_lost_a_prefix_and_the_stages_before_it_compute_it() -> None:
    prompt = text(1, 80)
    with running(native_stage("float32"), 3) as stages, scheduling(stages) as scheduler:
        first = tokens_of(submit(scheduler, prompt, NEW_TOKENS))
        stages[1].kill()
        stages[1].start()
        passed = [len(stage.passes) for stage in stages]
        stream = submit(scheduler, prompt, NEW_TOKENS)
        assert tokens_of(stream) == first
        computed = [
            sum(length for each in stage.passes[n:] for _, length in each) for stage, n in zip(stages, passed, strict=True)
        ]
        assert computed[0] == 80 + NEW_TOKENS - 1
        assert computed[2] == 80 - 64 + NEW_TOKENS - 1


def test_a_follow_up_goes_to_the_instance_that_has_its_prefix() -> None:
    make = native_stage("float32")
    with running(make, 3) as stages, running(lambda _: make(1), 2) as spare:
        middle = [stages[1], *spare]
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed) as scheduler:
            for index, own in ((0, stages[:1]), (1, middle), (2, stages[2:])):
                scheduler.endpoints_changed(index, [Endpoint(stage.url) for stage in own])
            talks = [text(number, 70) for number in range(3)]
            for turn in range(3):
                streams = [submit(scheduler, tokens, NEW_TOKENS) for tokens in talks]
                for tokens, stream in zip(talks, streams, strict=True):
                    tokens += [*tokens_of(stream), *text(turn, 20)]
                nothing_left([*stages, *spare])
                assert all(bool(stream.cached_tokens) == (turn > 0) for stream in streams)
                talks.append(talks.pop(0))  # otherwise their order alone would lead to the same instances


def test_a_sequence_on_another_instance_names_the_peer_that_has_its_prefix() -> None:
    make = native_stage("float32")
    with running(make, 3) as stages, running(lambda _: make(1), 1) as (other,):
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed, chunk_tokens=32) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            prompt = text(1, 100)
            tokens_of(submit(scheduler, prompt, 2))
            nothing_left(stages)
            stages[0].seconds = 0.02
            busy = submit(scheduler, text(2, 5), 100)
            wait_until(lambda: busy.token_ids, "its first token")
            scheduler.endpoints_changed(1, [Endpoint(stages[1].url), Endpoint(other.url)])
            assert len(tokens_of(submit(scheduler, prompt, 2))) == 2
            asked = [
                msgspec.json.decode(seen.body, type=ReserveRequest) for seen in other.seen if seen.type == EventType.RESERVE
            ]
            assert {row.peers for request in asked for row in request.rows} == {(stages[1].url,)}
            tokens_of(busy)


def test_an_instance_that_leaves_is_asked_for_what_it_was_given_and_for_nothing_else() -> None:
    """Each request makes its queue-proxy wait for another 30 s: asked for everything, it stays until it is killed."""
    make = native_stage("float32")
    with running(make, 3) as stages, running(lambda _: make(1), 1) as (other,):
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            known = text(1, 100)
            tokens_of(submit(scheduler, known, 2))
            nothing_left(stages)
            scheduler.endpoints_changed(1, [Endpoint(stages[1].url, ready=False, terminating=True), Endpoint(other.url)])
            for prompt, peers in ((known, (stages[1].url,)), (text(2, 150), ())):
                before = len(other.seen)
                tokens_of(submit(scheduler, prompt, 2))
                asked = [
                    msgspec.json.decode(seen.body, type=ReserveRequest)
                    for seen in other.seen[before:]
                    if seen.type == EventType.RESERVE
                ]
                assert {row.peers for request in asked for row in request.rows} == {peers}


def test_reservations_carry_token_ids_only_for_penalties() -> None:
    with running(native_stage("float32"), 3) as stages, scheduling(stages) as scheduler:
        for sampling in (Sampling(temperature=0.5), PENALIZED):
            tokens_of(submit(scheduler, text(1, 200), 2, sampling=sampling))
        plain, penalized = (len(seen.body) for seen in stages[0].seen if seen.type == EventType.RESERVE)
        assert plain < 500
        assert penalized > plain + 4 * 192
