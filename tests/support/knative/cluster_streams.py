"""Streams that go on while a pipeline on a real cluster is changed, or while its gateways are killed."""

import asyncio
import http.client
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Self

from eventing.wire.generation import GenerateResponse
from knative.commands.ask import AskFailed, Question, stream_answer
from tests.support.knative.real_cluster import MAX_TOKENS, Gateway, conversing

_PAUSE_SECONDS: Final = 0.5  # after a broken stream
_MOST_ATTEMPTS: Final = 20


@dataclass
class EventStreams:
    """Clients that ask without a pause, as CloudEvents, which name no model. They always show an API key."""

    url: str  # of the ingress, or of the gateway
    host: str | None  # the gateway's, if `url` is the ingress's
    api_key: str
    allowed: dict[str, set[str]]  # prompt → the answers of all versions that may answer
    answers: list[tuple[str, str]] = field(default_factory=list)  # prompt and text, in the order of their ends
    broken: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, count: int) -> Iterator[Self]:
        """Waits at the end for the answers that have begun."""
        over = threading.Event()

        async def converse(number: int) -> None:
            prompts = list(self.allowed)
            while not over.is_set():
                await self._ask_once(prompts[number % len(prompts)])
                number += 1

        async def converse_all() -> None:
            await asyncio.gather(*map(converse, range(count)))

        with ThreadPoolExecutor(1) as executor:
            conversing = executor.submit(asyncio.run, converse_all())
            try:
                yield self
            finally:
                over.set()
            conversing.result()

    def wrong(self) -> list[tuple[str, str]]:
        """Answers that no version gives, such as one that mixes two models."""
        return [(prompt, text) for prompt, text in self.answers if text not in self.allowed[prompt]]

    async def ask(self, prompt: str) -> str:
        """The text of the streamed answer. Raises AskFailed if it breaks."""
        text = ""
        question = Question(prompt, MAX_TOKENS, chat=False, api_key=self.api_key, host=self.host)
        async for answer in stream_answer(self.url, question):
            if isinstance(answer, GenerateResponse):
                if answer.text != text:
                    raise AskFailed(f"the stream has {text!r}, its last event {answer.text!r}")
            else:
                text += answer.text
        return text

    async def _ask_once(self, prompt: str) -> None:
        try:
            self.answers.append((prompt, await self.ask(prompt)))
        except AskFailed as error:
            self.broken.append(f"{time.strftime('%H:%M:%S')} {prompt!r}: {error}")
            await asyncio.sleep(_PAUSE_SECONDS)


@dataclass
class RetryingClients:
    """Clients that ask again with the same idempotency key after a stream has broken, until the answer is whole."""

    gateway: Gateway
    expected: dict[str, str]
    answers: int = 0
    broken_at: list[float] = field(default_factory=list)  # by time.monotonic()

    @contextmanager
    def running(self, count: int) -> Iterator[Self]:
        """Waits at the end for all answers. Raises AssertionError if one was wrong or did not come."""
        with conversing(count, self._converse):
            yield self

    def _converse(self, number: int, over: threading.Event) -> None:
        prompts = list(self.expected)
        while not over.is_set():
            prompt = prompts[number % len(prompts)]
            number += 1
            assert self._ask(prompt) == self.expected[prompt]
            self.answers += 1

    def _ask(self, prompt: str) -> str:
        key = str(uuid.uuid4())
        for _ in range(_MOST_ATTEMPTS):
            try:
                return "".join(self.gateway.stream(prompt, MAX_TOKENS, key))
            except (AssertionError, OSError, http.client.HTTPException):
                self.broken_at.append(time.monotonic())
                time.sleep(_PAUSE_SECONDS)
        raise AssertionError(f"{prompt!r} was not answered in {_MOST_ATTEMPTS} attempts")
