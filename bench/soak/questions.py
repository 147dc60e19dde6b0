"""What honest clients ask: greedy and drawn with a seed, in chat and to be continued; short, for many of them."""

from dataclasses import dataclass
from typing import Any, Final

from eventing.wire.generation import GenerateRequest, Message

_TEXTS: Final = (
    "What is the capital of France?",
    "Name three rivers of Europe.",
    "The lighthouse keeper climbed the stairs and",
    "Why does ice float on water?",
    "1, 1, 2, 3, 5, 8,",
    "Write one sentence about a winter morning.",
)
_TOKENS: Final = (16, 24, 32)


@dataclass(frozen=True, slots=True)
class Question:
    name: str
    text: str
    chat: bool  # through the chat template; else the text is continued as it is
    max_tokens: int
    temperature: float
    seed: int

    def event_data(self) -> GenerateRequest:
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        if self.chat:
            return GenerateRequest(messages=(Message("user", self.text),), **options)
        return GenerateRequest(prompt=self.text, **options)

    def openai_body(self, model: str, stream: bool) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.text}]} if self.chat else {"prompt": self.text}
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return {"model": model, **asked, **options, **more}

    @property
    def openai_path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


QUESTIONS: Final = tuple(
    Question(
        f"{'chat' if chat else 'text'} {number}{' drawn' if drawn else ''}",
        text,
        chat,
        _TOKENS[number % len(_TOKENS)],
        0.8 if drawn else 0.0,
        number,
    )
    for number, text in enumerate(_TEXTS)
    for chat in (True, False)
    for drawn in (False, True)
)
