"""Replays a trace against a gateway, in a process of its own, and records each answer's first and last token.

It prints BEGUN when the trace begins, so that its own start is not counted.

python -m bench.evaluation.replay URL TRACE.npz TIMES.npz TAIL_SECONDS
"""

import asyncio
import random
from pathlib import Path
from typing import Final

import click
import numpy as np

from bench.evaluation.outcome import PATIENCE_SECONDS
from bench.evaluation.trace import Floats, Trace
from eventing.wire.generation import TokenEvent
from knative.commands.ask import AskFailed, Question, stream_answer

BEGUN: Final = "begun"
ARRAYS: Final = ("arrival_seconds", "prompt_tokens", "answer_tokens")  # of a trace, in TRACE.npz
# Each is one token, with the space before it, of the default model's tokenizer.
_WORDS: Final = ("river", "stone", "lamp", "seven", "north", "glass", "quiet", "engine", "paper", "winter", "copper", "field")


async def replay(url: str, trace: Trace, tail_seconds: float) -> tuple[Floats, Floats, int, Floats, int]:
    """Times of each request's first and last token since the start (NaN: none), the tokens of all prompts, the seconds from
    each token of an answer to its next, of all answers, and how many answers ended with an error.

    tail_seconds: after the last arrival; answers that have not ended then are cancelled.
    """
    loop = asyncio.get_running_loop()
    print(BEGUN, flush=True)
    began = loop.time()
    first, last = np.full(len(trace), np.nan), np.full(len(trace), np.nan)
    prompts = errors = 0
    gaps: list[float] = []

    async def one(index: int) -> None:
        nonlocal prompts, errors
        await asyncio.sleep(trace.arrival_seconds[index] - (loop.time() - began))
        words = random.Random(index).choices(_WORDS, k=int(trace.prompt_tokens[index]))
        text, most = " " + " ".join(words), int(trace.answer_tokens[index])
        question = Question(text, most, chat=False, timeout_seconds=PATIENCE_SECONDS)
        try:
            before = np.nan
            async for answer in stream_answer(url, question):
                now = loop.time() - began
                if isinstance(answer, TokenEvent):
                    first[index] = np.fmin(first[index], now)
                    gaps.append(now - before)
                    before = now
                    continue
                last[index] = now
                first[index] = np.fmin(first[index], last[index])
                prompts += answer.usage.prompt_tokens
        except AskFailed:
            errors += 1

    tasks = [asyncio.create_task(one(index)) for index in range(len(trace))]
    _, late = await asyncio.wait(tasks, timeout=trace.seconds + tail_seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return first, last, prompts, np.array(gaps), errors


@click.command(help=__doc__)
@click.argument("url")
@click.argument("trace_file", type=click.Path(exists=True, path_type=Path))
@click.argument("times_file", type=click.Path(path_type=Path))
@click.argument("tail_seconds", type=float)
def main(url: str, trace_file: Path, times_file: Path, tail_seconds: float) -> None:
    arrays = np.load(trace_file)
    trace = Trace("trace", *(arrays[name] for name in ARRAYS))
    first, last, prompts, gaps, errors = asyncio.run(replay(url, trace, tail_seconds))
    np.savez(times_file, first=first, last=last, prompts=prompts, gaps=gaps[np.isfinite(gaps)], errors=errors)


if __name__ == "__main__":
    main()
