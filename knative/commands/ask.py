"""`python -m knative ask`: one question to a gateway, the answer as it streams."""

import asyncio
import time
from collections.abc import Callable

import click
from rich.console import Console

from eventing.wire.generation import GenerateResponse
from knative.commands.terminal.asking import AskFailed, Question, is_question
from knative.commands.terminal.asking import ask as ask_gateway

chat_option = click.option(
    "--chat/--raw",
    default=None,
    help="Through the model's chat template, or the prompt as it is. Default: a prompt that ends like a sentence is asked, "
    "an open one, such as 'The capital of France is', is continued.",
)


@click.command()
@click.argument("url")
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0 is greedy.")
@chat_option
@click.option("--api-key", envvar="LAMINA_API_KEY", show_envvar=True, help="Where the gateway wants one.")
@click.option("--host", help="Where URL is an ingress's address: the host of the gateway's URL, which does not resolve here.")
@click.option("--timeout", type=click.FloatRange(min=1), default=900.0, show_default=True, help="Seconds for the whole answer.")
def ask(
    url: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    chat: bool | None,
    api_key: str | None,
    host: str | None,
    timeout: float,
) -> None:
    """Ask the gateway at URL, as an HTTP CloudEvent, and print the answer while it streams.

    \b
    python -m knative ask http://127.0.0.1:8080 "What is the capital of France?"
    python -m knative ask http://127.0.0.1:8080 "The capital of France is" --max-tokens 8
    python -m knative ask http://203.0.113.7 --host chat.default.example.com "What is the capital of France?"
    """
    as_chat = is_question(prompt) if chat is None else chat
    asyncio.run(show_answer(Console(), url, Question(prompt, max_tokens, temperature, as_chat, api_key, timeout, host)))


async def show_answer(
    console: Console, url: str, question: Question, begins: Callable[[], object] = lambda: None
) -> GenerateResponse:
    """Prints the answer's text as it comes, then one line on how it went. `begins` is called ahead of each piece.

    Raises AskFailed.
    """
    asked_at = time.monotonic()
    first_at: float | None = None
    async for answer in ask_gateway(url, question):
        now = time.monotonic()
        if isinstance(answer, GenerateResponse):
            first_at = now if first_at is None else first_at
            _show_timings(console, answer, first_at - asked_at, now - first_at)
            return answer
        first_at = now if first_at is None else first_at
        begins()
        console.out(answer.text, end="", highlight=False)
        console.file.flush()
    raise AskFailed(f"{url}: the answer had no end")


def _show_timings(console: Console, answer: GenerateResponse, first_seconds: float, other_seconds: float) -> None:
    """By the clock of whoever waited: the gateway's own begins when it has started, and ends before the network."""
    usage = answer.usage
    rate = (usage.completion_tokens - 1) / other_seconds if usage.completion_tokens > 1 and other_seconds > 0 else 0.0
    console.out()
    console.out(
        f"({usage.prompt_tokens} + {usage.completion_tokens} tokens, first after {first_seconds:.2f} s, "
        f"then {rate:.1f} tokens/s, {answer.finish_reason})",
        highlight=False,
        style="dim",
    )
