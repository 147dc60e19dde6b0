"""How much code one token passes through: `python -m bench.walk`, `--list` for every module and function. Ten seconds.

A gateway and one stage run as processes over a tiny model, and a client streams one conversation. Each process counts its
Python calls. A long answer less a short one leaves decode rounds alone; divided by their number that is one round. A hand-over
is a wait of a thread that another thread of the process ended. Calls into C are not counted.

Four parts are counted apart. The *hop* is what a token must pass: the gateway decides, sends and applies, the stage receives,
computes a batch and replies. Its two other parts run beside it (the API, which streams the token to its client) or depend on
the model (the layers).
"""

import http.client
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench import report
from bench.report import ROOT

_PACKAGES: Final = ("eventing", "functions", "knative", "storage")
_API: Final = (
    *(f"functions/gateway/{package}/" for package in ("answers", "cloudevents", "openai", "openapi", "page", "text")),
    "functions/hosting/",
    "eventing/http/sse.py",
)
_LAYERS: Final = ("functions/stage/models/", "functions/stage/native/", "storage/")
_REPORT: Final = "BENCH_WALK_REPORT"  # environment key: the file that a traced process writes its counts to
_HAND_OVER: Final = "(hand-over)"
_HAND_OVER_SECONDS: Final = 20e-6  # an acquire that takes longer has waited for another thread
_ROUND_SHARE: Final = 0.5  # a module or function belongs to a round if it is called in at least this share of rounds
_PROMPT: Final = "The capital of France is"
_SHORT_TOKENS: Final = 8
_WAIT_SECONDS: Final = 60.0

Call = tuple[str, str, str]  # file of the function, its name, and the project's file nearest to it in the stack
Counts = Mapping[Call, float]


@dataclass(frozen=True)
class Walk:
    """What one round calls in one part of one process. Files of the project are paths below its root."""

    counts: Counts

    @property
    def modules(self) -> list[str]:
        calls: Counter[str] = Counter()
        for (file, _, _), number in self.counts.items():
            calls[file] += number  # type: ignore[assignment]  # typeshed knows counters of whole numbers only
        return sorted(file for file, number in calls.items() if _is_project(file) and number >= _ROUND_SHARE)

    @property
    def lines(self) -> int:
        return sum(len((ROOT / module).read_text(encoding="utf-8").splitlines()) for module in self.modules)

    @property
    def project_calls(self) -> float:
        return sum(number for (file, _, _), number in self.counts.items() if _is_project(file))

    @property
    def all_calls(self) -> float:
        return sum(number for (file, _, _), number in self.counts.items() if file != _HAND_OVER)

    @property
    def hand_overs(self) -> float:
        return sum(number for (file, _, _), number in self.counts.items() if file == _HAND_OVER)

    def __add__(self, other: "Walk") -> "Walk":
        both = self.counts.keys() | other.counts.keys()
        return Walk({call: self.counts.get(call, 0.0) + other.counts.get(call, 0.0) for call in both})

    def part(self, prefixes: tuple[str, ...]) -> tuple["Walk", "Walk"]:
        """Calls outside of `prefixes`, and inside. A library's call is the part's that it was made for."""
        inside = {call: number for call, number in self.counts.items() if call[2].startswith(prefixes)}
        return Walk({call: number for call, number in self.counts.items() if call not in inside}), Walk(inside)


def _is_project(file: str) -> bool:
    return file.partition("/")[0] in _PACKAGES


# In a traced process.


def traced() -> int:
    """Runs a function as `python -m functions` does, and writes its counts to a file at each SIGUSR1."""
    counts: Counter[Call] = Counter()
    waits: dict[int, float] = {}  # thread → when its acquire began
    files: dict[str, str] = {}

    def owner(frame: FrameType | None) -> str:
        while frame is not None:
            file = files.setdefault(name := frame.f_code.co_filename, name.removeprefix(f"{ROOT}/"))
            if _is_project(file):
                return file
            frame = frame.f_back
        return ""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call":
            counts[code.co_filename, code.co_name, owner(frame)] += 1
        elif event == "c_call" and argument.__name__ == "acquire" and code.co_name != "_is_owned":
            waits[threading.get_ident()] = time.perf_counter()
        elif event == "c_return" and argument.__name__ == "acquire":
            began = waits.pop(threading.get_ident(), None)
            if began is not None and time.perf_counter() - began > _HAND_OVER_SECONDS:
                counts[_HAND_OVER, code.co_name, owner(frame)] += 1

    def write(*_: object) -> None:
        sys.setprofile(None)  # its own calls are not the round's
        seen = [[file.removeprefix(f"{ROOT}/"), name, owner, calls] for (file, name, owner), calls in list(counts.items())]
        draft = Path(os.environ[_REPORT] + ".draft")
        draft.write_text(json.dumps(seen), encoding="utf-8")
        draft.rename(os.environ[_REPORT])
        sys.setprofile(profile)

    signal.signal(signal.SIGUSR1, write)
    threading.setprofile(profile)
    sys.setprofile(profile)
    from functions.__main__ import main as run

    return run([], {name: value for name, value in os.environ.items() if name != _REPORT})


# In the process that measures.


def measure(folder: Path, tokens: int = 64) -> tuple[Walk, Walk]:
    """A decode round in the gateway, and in its only stage."""
    from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
    from tests.support.storage.published import CUT, published_model

    cut = ((CUT[0][0], CUT[-1][1]),)
    command = ("-m", "bench.walk", "--traced")
    reports = [folder / "gateway.json", folder / "stage.json"]
    with published_model(folder) as published:
        environ = stage_environment(published, 0, cut, LAMINA_LAYER_GROUP="native") | {_REPORT: str(reports[1])}
        with FunctionProcess(environ, command) as stage:
            environ = gateway_environment(published, [stage.wait_ready().url], cut, LAMINA_DRAFT_TOKENS="0")
            with FunctionProcess(environ | {_REPORT: str(reports[0])}, command) as gateway:
                pids = [gateway.process.pid, stage.process.pid]
                before, between, after = _counted(gateway.wait_ready().url, pids, reports, tokens)
    gateway_walk, stage_walk = (
        Walk({call: (late.get(call, 0) - 2 * middle.get(call, 0) + early.get(call, 0)) / tokens for call in late})
        for early, middle, late in zip(before, between, after, strict=True)
    )
    return gateway_walk, stage_walk


def _counted(url: str, pids: Sequence[int], files: Sequence[Path], tokens: int) -> Iterator[list[Counts]]:
    """Counts of the processes after a warm-up, after a short answer, and after one that is longer by `tokens`."""
    for length in (_SHORT_TOKENS + tokens, _SHORT_TOKENS, _SHORT_TOKENS + tokens):
        _stream(url, length)
        time.sleep(0.5)  # threads finish what follows an answer
        yield [_report(pid, file) for pid, file in zip(pids, files, strict=True)]


def _stream(url: str, tokens: int) -> None:
    """Reads a streamed answer as a client does. Raises RuntimeError if it is not as long as asked for."""
    asked = {"model": "tiny", "prompt": _PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_WAIT_SECONDS)
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse().read().decode()
    connection.close()
    if f'"completion_tokens":{tokens},' not in answer:
        raise RuntimeError(f"{tokens} tokens were asked for, and the answer was {answer[-500:]}")


def _report(pid: int, file: Path) -> Counts:
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + _WAIT_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {pid} wrote no counts to {file}")
        time.sleep(0.01)
    return {(path, name, owner): calls for path, name, owner, calls in json.loads(file.read_text(encoding="utf-8"))}


def parts(gateway: Walk, stage: Walk) -> dict[str, Walk]:
    gateway_hop, api = gateway.part(_API)
    stage_hop, layers = stage.part(_LAYERS)
    return {
        "hop, gateway": gateway_hop,
        "hop, stage": stage_hop,
        "hop, together": gateway_hop + stage_hop,
        "API, beside the hop": api,
        "layers of the model": layers,
        "everything": gateway + stage,
    }


def table(walks: Mapping[str, Walk]) -> str:
    columns = ["one decode round", "modules", "lines", "calls of the project", "Python calls in all", "hand-overs"]
    rows = []
    for name, walk in walks.items():
        numbers = (len(walk.modules), walk.lines, walk.project_calls, walk.all_calls)
        rows.append([name, *(f"{number:.0f}" for number in numbers), f"{walk.hand_overs:.1f}"])
    return report.table(columns, rows)


def functions(walk: Walk) -> str:
    """Its modules, and its functions with their calls in a round."""
    lines = [f"  {len((ROOT / module).read_text(encoding='utf-8').splitlines()):4} lines  {module}" for module in walk.modules]
    for (file, name, owner), calls in sorted(walk.counts.items(), key=lambda item: -item[1]):
        if calls >= _ROUND_SHARE:
            lines.append(f"  {calls:5.1f}  {file} {name}" + ("" if _is_project(file) else f"  for {owner}"))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--traced"]:
        return traced()
    if list(arguments) not in ([], ["--list"]):
        print(f"{' '.join(arguments)}: only --list is known\n\n{__doc__}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        walks = parts(*measure(Path(folder)))
    print(table(walks))
    if arguments:
        for name in ("hop, gateway", "hop, stage", "API, beside the hop", "layers of the model"):
            print(f"\n{name}\n{functions(walks[name])}")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a traced function leaves threads behind
