"""What is asked with and without keys and values that are held. Each text is used once: only what is meant is found."""

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
    """Of a stated number of tokens, none of which begins like another."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._starts = count(0, 61)

    def text(self, tokens: int) -> str:
        return self._requests.text(next(self._starts), tokens)


def second_turns(case: Case, holding: Server, plain: Server, texts: Texts, rounds: int) -> Iterator[Found]:
    """A conversation of 2,000 tokens goes on: where its first turn was answered, and where nothing is remembered."""
    for _ in range(rounds):
        messages = [said("user", texts.text(TURN_TOKENS))]
        answer = holding.ask(messages, ANSWER_TOKENS)
        messages += [said("assistant", answer.text), said("user", texts.text(OWN_TOKENS))]
        held = holding.ask(messages, ANSWER_TOKENS)
        without = plain.ask(messages, ANSWER_TOKENS)
        yield Found(case, held.seconds, without.seconds, int(held.text != without.text))


def shared_prompt(holding: Server, plain: Server, texts: Texts) -> Found:
    """Many at once that begin alike."""
    system = said("system", texts.text(_SHARED_TOKENS))
    questions: list[Messages] = [[system, said("user", texts.text(OWN_TOKENS))] for _ in range(_AT_ONCE)]
    without, plain_seconds = plain.ask_at_once(questions, 2)
    answers, seconds = holding.ask_at_once(questions, 2)
    different = sum(one.text != other.text for one, other in zip(answers, without, strict=True))
    computed = sum(one.prompt_tokens - one.cached_tokens for one in answers)
    return Found(Case.SHARED_PROMPT, seconds, plain_seconds, different, computed)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
