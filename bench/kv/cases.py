"""The questions that one process answers with and without a prefix cache. Each text is used once: nothing else is found."""

import asyncio
from collections.abc import Iterator
from itertools import count
from typing import Final

from bench.kv.client import Messages, Server
from bench.kv.report import Case, Found
from bench.serving.requests import Requests

ANSWER_TOKENS: Final = 32
TURN_TOKENS: Final = 1_950
_SHARED_TOKENS: Final = 980
OWN_TOKENS: Final = 40  # the chat template adds the rest to 2,000, 1,000 and 50
_AT_ONCE: Final = 32


class Texts:
    """Texts of a stated number of tokens, all with different beginnings."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._starts = count(0, 61)

    def text(self, tokens: int) -> str:
        return self._requests.cut(next(self._starts), tokens, 1).text

    def question(self, tokens: int) -> dict[str, str]:
        """A user's message."""
        return {"role": "user", "content": self.text(tokens)}


def second_turns(case: Case, holding: Server, plain: Server, texts: Texts, rounds: int) -> Iterator[Found]:
    """A conversation of 2,000 tokens goes on, at the server that answered its first turn and at one without a cache."""
    for _ in range(rounds):
        messages = [texts.question(TURN_TOKENS)]
        answer = holding.ask(messages, ANSWER_TOKENS)
        messages += [{"role": "assistant", "content": answer.text}, texts.question(OWN_TOKENS)]
        held = holding.ask(messages, ANSWER_TOKENS)
        without = plain.ask(messages, ANSWER_TOKENS)
        yield Found(case, held.seconds, without.seconds, int(held.text != without.text))


def shared_prompt(holding: Server, plain: Server, texts: Texts) -> Found:
    """Many conversations at once with the same system prompt."""
    system = {"role": "system", "content": texts.text(_SHARED_TOKENS)}
    questions: list[Messages] = [[system, texts.question(OWN_TOKENS)] for _ in range(_AT_ONCE)]
    without, plain_seconds = asyncio.run(plain.answers(questions, 2))
    answers, seconds = asyncio.run(holding.answers(questions, 2))
    different = sum(one.text != other.text for one, other in zip(answers, without, strict=True))
    computed = sum(one.prompt_tokens - one.cached_tokens for one in answers)
    return Found(Case.SHARED_PROMPT, seconds, plain_seconds, different, computed)
