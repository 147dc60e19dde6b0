"""What an emulated run costs beside its profile on this machine: measured with one conversation, from the outside.

The time of a token is that of all passes and hops. Passes are told by the stages' own metrics; what is left are hops.
"""

import asyncio
from pathlib import Path
from typing import Final

import numpy as np

from bench.evaluation.emulated import EmulatedRun
from bench.evaluation.rounds import Overheads
from bench.evaluation.setting import WAYS, Setting
from bench.evaluation.trace import Trace
from storage.store.object_store import ObjectStore

_PROMPT_TOKENS: Final = 64
_ANSWER_TOKENS: Final = 200
_PAUSE_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 40.0


def measure_overheads(setting: Setting, store: ObjectStore, folder: Path) -> Overheads:
    """One conversation through a static pipeline, a second apart from its start."""
    way = WAYS[2]
    trace = Trace("one", np.array([_PAUSE_SECONDS]), np.array([_PROMPT_TOKENS]), np.array([_ANSWER_TOKENS]))
    run = EmulatedRun(setting, way, trace, store, folder, _ANSWER_SECONDS)
    outcome = asyncio.run(run.run())
    times = setting.pass_times(way)
    held = _PROMPT_TOKENS + _ANSWER_TOKENS / 2
    profiled = [each.forward_seconds(1, held, held) + each.logits_seconds(1) for each in times]
    measured = [seconds / passes for seconds, passes in run.passes if passes]
    beside = max(0.0, float(np.mean([mean - each for mean, each in zip(measured, profiled, strict=True)])))
    hops = outcome.token_seconds[0] - sum(profiled) - len(times) * beside
    return Overheads(pass_seconds=beside, hop_seconds=max(0.0, hops / len(times)))
