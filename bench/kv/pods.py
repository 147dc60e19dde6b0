"""Questions while pods come and go: keys and values from a peer, from the store, under running conversations, from zero."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import aiohttp

from bench.client import connections
from bench.kv.cases import ANSWER_TOKENS, OWN_TOKENS, TURN_TOKENS, Texts
from bench.kv.client import Messages, Server, text_in
from bench.kv.deployed import Deployed, tokens_computed
from bench.kv.report import Case, Found

CONVERSATIONS_GOING_ON: Final = 10
_LONGEST_ANSWER: Final = 1_024  # of running conversations; they are cancelled before its end
_AFTER: Final = 8  # pieces of text that each conversation must get after a stage is scaled in


async def from_peer(at: Deployed, texts: Texts, rounds: int) -> AsyncIterator[Found]:
    """The pods that hold the conversations drain; new pods take over."""
    turns = await _first_turns(at.holding, texts, rounds)
    for stage in at.stages:
        await at.another_pod(stage)
    for stage in at.stages:
        at.scale_in(stage)
    await _warm_up(at.holding, texts)
    async for found in _second_turns(Case.PEER, at, turns):
        yield found
    await asyncio.gather(*at.drains)


async def from_store(at: Deployed, texts: Texts, rounds: int) -> AsyncIterator[Found]:
    """All stages went to zero, and are awake again when the conversations go on."""
    turns = await _first_turns(at.holding, texts, rounds)
    await at.to_zero(gateways=False)
    await _warm_up(at.holding, texts)
    await at.stay_up()
    async for found in _second_turns(Case.STORE, at, turns):
        yield found


async def from_zero(at: Deployed, texts: Texts) -> AsyncIterator[Found]:
    """All pods, gateways too, went to zero: the last of ten first tokens, compared with ten that awake pods compute."""
    turns = await _first_turns(at.holding, texts, CONVERSATIONS_GOING_ON)
    await at.to_zero(gateways=True)
    held, _ = await at.holding.answers(turns, ANSWER_TOKENS)
    await _warm_up(at.plain, texts)
    await at.stay_up()
    plain, _ = await at.plain.answers(turns, ANSWER_TOKENS)
    await at.to_zero(gateways=True)
    (cold,), _ = await at.holding.answers([[texts.question(OWN_TOKENS)]], 1)
    await at.stay_up()
    seconds, plain_seconds = (max(one.seconds for one in answers) for answers in (held, plain))
    different = sum(one.text != other.text for one, other in zip(held, plain, strict=True))
    least_held = min(one.cached_share for one in held)
    yield Found(Case.FROM_ZERO, seconds, plain_seconds, different, start_seconds=cold.seconds, held=least_held)


async def scaled_in(at: Deployed, texts: Texts, conversations: int) -> AsyncIterator[Found]:
    """The middle stage loses the pod of all conversations: the longest pause, and the tokens that the other pod computed."""
    questions: list[Messages] = [[texts.question(TURN_TOKENS)] for _ in range(conversations)]
    plain, plain_pause, _ = await _scaled_in(at, at.plain, questions)
    held, pause, computed_again = await _scaled_in(at, at.holding, questions)
    # Answers were cancelled at different lengths.
    texts_of_both = [(one.text, other.text) for one, other in zip(held, plain, strict=True)]
    different = sum(one[: len(other)] != other[: len(one)] for one, other in texts_of_both)
    yield Found(Case.SCALED_IN, pause, plain_pause, different, computed_again)


@dataclass(slots=True)
class Stream:
    """An answer that is being streamed."""

    text: str = ""
    arrived: list[float] = field(default_factory=list)  # seconds of each piece of text

    async def read(self, server: Server, session: aiohttp.ClientSession, question: Messages, over: asyncio.Event) -> None:
        async with aclosing(server.stream(session, question, _LONGEST_ANSWER)) as documents:
            async for document in documents:
                if text := text_in(document):
                    self.text += text
                    self.arrived.append(time.perf_counter())
                if over.is_set():
                    return

    def since(self, moment: float) -> list[float]:
        return [each for each in self.arrived if each > moment]

    def pause(self, moment: float) -> float:
        """The longest pause after `moment`."""
        return max(later - earlier for earlier, later in pairwise([moment, *self.since(moment)]))


async def _scaled_in(at: Deployed, server: Server, questions: Sequence[Messages]) -> tuple[list[Stream], float, int]:
    """The answers, their longest pause, and the tokens that the remaining pod computed beyond theirs."""
    middle, over = at.stages[1], asyncio.Event()
    streams = [Stream() for _ in questions]
    async with connections() as session, asyncio.TaskGroup() as group:
        readers = [
            group.create_task(stream.read(server, session, question, over))
            for stream, question in zip(streams, questions, strict=True)
        ]
        await _each(streams, readers, 0.0, 1)
        pod = await at.another_pod(middle)
        before, moment = await tokens_computed(pod), time.perf_counter()
        at.scale_in(middle)
        await _each(streams, readers, moment, _AFTER)
        computed = await tokens_computed(pod) - before
        pieces = sum(len(stream.since(moment)) for stream in streams)
        over.set()
    await asyncio.gather(*at.drains)
    return streams, max(stream.pause(moment) for stream in streams), max(0, computed - pieces)


async def _each(streams: Sequence[Stream], readers: Sequence["asyncio.Task[None]"], moment: float, pieces: int) -> None:
    """Waits until each stream got this many pieces since `moment`. Raises RuntimeError if one ended before."""
    while any(len(stream.since(moment)) < pieces for stream in streams):
        if any(reader.done() for reader in readers):
            raise RuntimeError("an answer ended before the stage was scaled in: this machine is too slow for so many")
        await asyncio.sleep(0.02)


async def _first_turns(server: Server, texts: Texts, count: int) -> list[Messages]:
    """Asks first questions and returns the conversations with their second questions."""
    firsts = [texts.question(TURN_TOKENS) for _ in range(count)]
    answers, _ = await server.answers([[first] for first in firsts], ANSWER_TOKENS)
    return [
        [first, {"role": "assistant", "content": answer.text}, texts.question(OWN_TOKENS)]
        for first, answer in zip(firsts, answers, strict=True)
    ]


async def _second_turns(case: Case, at: Deployed, turns: Sequence[Messages]) -> AsyncIterator[Found]:
    """Asks the cached ones first, one after the other: a draining pod does not wait."""
    held = [(await at.holding.answers([turn], ANSWER_TOKENS))[0][0] for turn in turns]
    for one, turn in zip(held, turns, strict=True):
        (other,), _ = await at.plain.answers([turn], ANSWER_TOKENS)
        yield Found(case, one.seconds, other.seconds, int(one.text != other.text), held=one.cached_share)


async def _warm_up(server: Server, texts: Texts) -> None:
    """Asks another question, so that no start is measured."""
    await server.answers([[texts.question(OWN_TOKENS)]], 4)
