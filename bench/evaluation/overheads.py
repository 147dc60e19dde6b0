"""What an emulated run costs beside its profile on this machine: measured under a steady load, from the outside.

The time of a token is that of all passes and hops. Passes are told by the stages' own metrics; what is left are hops. They are
measured while prompts come and others answer: alone, a conversation's hop takes 1.4 ms here, and 2.0 while hidden states of
prompts, megabytes each, go through the same two cores.
"""

import asyncio
from pathlib import Path
from typing import Final

import numpy as np

from bench.evaluation.emulated import EmulatedRun
from bench.evaluation.rounds import Overheads, Work, flow
from bench.evaluation.setting import WAYS, Setting
from bench.evaluation.trace import Trace
from functions.configuration.pass_times import PassTimes, pairs
from functions.gateway.scheduling.batching import SchedulerLimits
from storage.store.object_store import ObjectStore

_REQUESTS: Final = 40
_A_SECOND: Final = 1.0
_PROMPT_TOKENS: Final = 1024
_ANSWER_TOKENS: Final = 160
_TAIL_SECONDS: Final = 20.0


def measure_overheads(setting: Setting, store: ObjectStore, folder: Path) -> Overheads:
    """Of a static pipeline, which has as many micro-batches as stages."""
    way = WAYS[2]
    arrivals = 1.0 + np.arange(_REQUESTS) / _A_SECOND
    trace = Trace("steady", arrivals, np.full(_REQUESTS, _PROMPT_TOKENS), np.full(_REQUESTS, _ANSWER_TOKENS))
    run = EmulatedRun(setting, way, trace, store, folder, _TAIL_SECONDS)
    token_seconds = asyncio.run(run.run()).token_seconds[0]
    times = setting.pass_times(way)
    answering = _A_SECOND * _ANSWER_TOKENS * token_seconds
    work = Work(
        decoding=round(answering),
        micro_batches=len(times),
        held_tokens=_PROMPT_TOKENS + _ANSWER_TOKENS / 2,
        prompt_tokens=0,
        chunk_tokens=1,
        hop_bytes_per_token=0,
    )
    measured = [seconds / passes for seconds, passes in run.passes if passes]
    beside = max(0.0, float(np.mean(measured)) - _mean_pass(times, work))
    ready = [setting.replicas(way)] * len(times)
    unhindered = flow(times, ready, work, Overheads(pass_seconds=beside, hop_seconds=0.0)).round_seconds
    return Overheads(pass_seconds=beside, hop_seconds=max(0.0, (token_seconds - unhindered) / len(times)))


def _mean_pass(times: list[PassTimes], work: Work) -> float:
    """By the profile, of the steps and chunks of one answer."""
    rows = work.decoding / work.micro_batches
    chunk = SchedulerLimits().chunk_tokens
    chunks, steps = _PROMPT_TOKENS / chunk, _ANSWER_TOKENS / rows
    held = rows * work.held_tokens
    seconds = [
        steps * (each.forward_seconds(rows, held, held) + each.logits_seconds(rows))
        + chunks * (each.forward_seconds(chunk, pairs(_PROMPT_TOKENS / 2, chunk), _PROMPT_TOKENS / 2) + each.logits_seconds(1))
        for each in times
    ]
    return float(np.mean(seconds)) / (steps + chunks)
