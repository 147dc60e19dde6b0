"""Requests over time: their arrivals and the lengths of prompts and answers, read from a file or drawn from a seed.

A file has the form of the Azure LLM inference traces (https://github.com/Azure/AzurePublicDataset, described in Patel et al.,
"Splitwise", ISCA 2024): `TIMESTAMP,ContextTokens,GeneratedTokens`, plain or gzip.
"""

import csv
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOST_TOKENS: Final = 1_000_000  # of a prompt or an answer: a larger number means a broken file
MOST_GAP_SECONDS: Final = 600.0  # a longer silence is a hole in the recording, whose two sides are not one load
_TICKS: Final = 26  # characters of a timestamp down to microseconds; the published files have one digit more

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class TraceInvalid(ValueError):
    """The file is no trace. The message names line, column and content, and says what to do."""


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """Requests in order of arrival; arrays of one length."""

    name: str
    arrival_seconds: Floats  # since the start
    prompt_tokens: Integers
    answer_tokens: Integers

    def __len__(self) -> int:
        return len(self.arrival_seconds)

    @property
    def seconds(self) -> float:
        return float(self.arrival_seconds[-1]) if len(self) else 0.0

    def part(self, begin: float, end: float) -> "Trace":
        """The arrivals in [begin, end), shifted to 0. Raises TraceInvalid if it has none."""
        kept = (self.arrival_seconds >= begin) & (self.arrival_seconds < end)
        if not kept.any():
            raise TraceInvalid(f"{self.name}: no request between {begin:g} and {end:g} s; it has {self.seconds:.0f} s")
        return Trace(self.name, self.arrival_seconds[kept] - begin, self.prompt_tokens[kept], self.answer_tokens[kept])

    def times(self, factor: float, seed: int) -> "Trace":
        """The trace with `factor` times as many requests: shifted copies, and a random part of one more."""
        dice = np.random.default_rng(seed)
        arrivals, chosen = [], []
        for copy in range(int(np.ceil(factor))):
            share = min(1.0, factor - copy)
            index = np.flatnonzero(dice.random(len(self)) < share) if share < 1 else np.arange(len(self))
            shift = dice.uniform(0, self.seconds) if copy else 0.0
            arrivals.append((self.arrival_seconds[index] + shift) % max(self.seconds, 1e-9))
            chosen.append(index)
        arrival, index = np.concatenate(arrivals), np.concatenate(chosen)
        order = np.argsort(arrival, kind="stable")
        index = index[order]
        return Trace(f"{self.name} × {factor:g}", arrival[order], self.prompt_tokens[index], self.answer_tokens[index])

    def within(self, context_tokens: int) -> "Trace":
        """Truncates prompts so that prompt and answer fit a context, and answers to half of it."""
        answers = np.minimum(self.answer_tokens, context_tokens // 2)
        return Trace(self.name, self.arrival_seconds, np.minimum(self.prompt_tokens, context_tokens - answers), answers)

    def with_answers_within(self, most_tokens: int) -> "Trace":
        """Truncates answers, for runs of a minute in which the longest would not end."""
        return Trace(self.name, self.arrival_seconds, self.prompt_tokens, np.minimum(self.answer_tokens, most_tokens))


def read_trace(path: Path) -> Trace:
    """Raises TraceInvalid, OSError."""
    arrivals: list[float] = []
    sizes: list[tuple[int, int]] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if tuple(header) != COLUMNS:
                raise TraceInvalid(f"{path}: begins with {','.join(header)[:80]!r}, not with {','.join(COLUMNS)}")
            for line, row in enumerate(rows, start=2):
                at, prompt, answer = _row(row, f"{path}, line {line}")
                if arrivals and at < arrivals[-1]:
                    raise TraceInvalid(f"{path}, line {line}: {row[0]} is before the line above it; sort the file by TIMESTAMP")
                if arrivals and at - arrivals[-1] > MOST_GAP_SECONDS:
                    gap = f"nothing for {at - arrivals[-1]:.0f} s before it, more than {MOST_GAP_SECONDS:g}"
                    raise TraceInvalid(f"{path}, line {line}: {gap}: a hole in the recording? Take one side of it")
                arrivals.append(at)
                sizes.append((prompt, answer))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise TraceInvalid(f"{path}: cannot be read as CSV ({error})") from error
    if not arrivals:
        raise TraceInvalid(f"{path}: holds no request")
    found = np.array(sizes, np.int64)
    return Trace(path.name.split(".")[0], np.array(arrivals) - arrivals[0], found[:, 0], found[:, 1])


def _row(row: list[str], where: str) -> tuple[float, int, int]:
    if len(row) != len(COLUMNS) or not all(row):
        raise TraceInvalid(f"{where}: {','.join(row)[:80]!r} has not three values; complete the line or take it out")
    try:
        at = datetime.fromisoformat(row[0][:_TICKS]).timestamp()
    except ValueError as error:
        raise TraceInvalid(f"{where}: {row[0][:40]!r} is no TIMESTAMP such as 2023-11-16 18:15:46.6805900") from error
    sizes = []
    for column, text in zip(COLUMNS[1:], row[1:], strict=True):
        if not (text.isascii() and text.isdecimal()) or not 0 < int(text[:12]) <= MOST_TOKENS:
            raise TraceInvalid(f"{where}: {column} is {text[:40]!r}, not a number from 1 to {MOST_TOKENS}")
        sizes.append(int(text))
    return at, sizes[0], sizes[1]


def drawn(name: str, rates: Floats, seconds_each: float, seed: int, sizes: "Sizes") -> Trace:
    """Poisson arrivals with a rate (requests a second) that changes every `seconds_each`, and lengths drawn from `sizes`."""
    dice = np.random.default_rng(seed)
    counts = dice.poisson(rates * seconds_each)
    begins = np.repeat(np.arange(len(rates)) * seconds_each, counts)
    arrivals = np.sort(begins + dice.uniform(0, seconds_each, len(begins)))
    return Trace(name, arrivals, *sizes.draw(dice, len(arrivals)))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Log-normal lengths of prompts and answers. The defaults fit the conversational Azure trace of 2023."""

    prompt_log_mean: float = 6.633
    prompt_log_deviation: float = 0.985
    answer_log_mean: float = 5.019
    answer_log_deviation: float = 0.859
    most_prompt_tokens: int = 14_050
    most_answer_tokens: int = 1_000

    def draw(self, dice: np.random.Generator, count: int) -> tuple[Integers, Integers]:
        prompts = _whole(dice.lognormal(self.prompt_log_mean, self.prompt_log_deviation, count), self.most_prompt_tokens)
        answers = _whole(dice.lognormal(self.answer_log_mean, self.answer_log_deviation, count), self.most_answer_tokens)
        return prompts, answers


def _whole(drawn_sizes: npt.NDArray[Any], most: int) -> Integers:
    whole: Integers = np.clip(np.rint(drawn_sizes), 1, most).astype(np.int64)
    return whole


LOADS: Final = ("ramp", "bursts", "day", "trace")
_NIGHT_SHARE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Bursts:
    """Seconds at the peak, then seconds at a tenth of it, again and again."""

    seconds: int = 24
    pause_seconds: int = 36


def rates(load: str, seconds: int, peak: float, bursts: Bursts = Bursts()) -> Floats:
    """Requests a second, for every second of the load."""
    at = np.arange(seconds) / seconds
    if load == "ramp":
        return peak * np.minimum(1.0, at / 0.8)
    if load == "bursts":
        in_period = np.arange(seconds) % (bursts.seconds + bursts.pause_seconds)
        return np.where(in_period < bursts.seconds, peak, 0.1 * peak)
    if load == "day":
        return peak * np.maximum(_NIGHT_SHARE, np.sin(np.pi * np.clip((at - 0.2) / 0.6, 0, 1)))
    if load == "trace":
        return np.full(seconds, 0.6 * peak)
    raise ValueError(f"load {load!r}: there is {', '.join(LOADS)}")


def make_loads(seconds: int, peak: float, seed: int, trace: Trace | None, bursts: Bursts = Bursts()) -> Mapping[str, Trace]:
    """peak: requests a second. trace: the load "trace" is a part of it, at 0.6 × peak; None: it is drawn."""
    found = {load: drawn(load, rates(load, seconds, peak, bursts), 1.0, seed, Sizes()) for load in LOADS}
    if trace is not None:
        begin = (trace.seconds / 2 + seed * seconds) % max(1.0, trace.seconds - seconds)
        wanted = 0.6 * peak / (len(trace) / trace.seconds)
        part = trace.times(wanted, seed).part(begin, begin + seconds)
        found["trace"] = Trace("trace", part.arrival_seconds, part.prompt_tokens, part.answer_tokens)
    return found
