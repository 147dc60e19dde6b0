"""Results of runs on disk, one file each, so that no run is repeated."""

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

import msgspec

from bench.evaluation.outcome import Outcome

# Two-sided intervals of 95 %, by degrees of freedom.
_STUDENT_95: Final = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class RunKey(msgspec.Struct, frozen=True, kw_only=True):
    """Identifies a run. It contains everything that changes a result, so that no outdated result is reused."""

    experiment: str
    load: str
    way: str
    seed: int
    seconds: int
    peak: float  # requests a second
    bursts: tuple[int, int]  # seconds at the peak, and between
    setting: str  # model, device, stages, devices: for people and for the file's name
    tail_seconds: float
    answer_tokens: int
    trace: str | None = None  # digest of the named file
    profile: str | None = None  # digest of a measured one
    overheads: tuple[float, float, float] | None = None

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:10]
        readable = f"{self.load}-{self.way}-{self.seed}".replace(",", "").replace(" ", "-")
        return f"{self.experiment}/{readable}-{digest}.yaml"


class Result(msgspec.Struct, frozen=True):
    key: RunKey
    outcome: Outcome
    peak_pods: int | None = None
    load_average: float | None = None  # of the machine when the run ended
    wall_seconds: float | None = None


class Results:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, key: RunKey, run: Callable[[], Result]) -> Result:
        """The result on disk, or else of `run`. An unreadable file is run again."""
        path = self._folder / key.file_name
        if (found := self.read(key)) is not None:
            return found
        result = run()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(msgspec.yaml.encode(result))
        unfinished.replace(path)
        return result

    def read(self, key: RunKey) -> Result | None:
        try:
            return msgspec.yaml.decode((self._folder / key.file_name).read_bytes(), type=Result)
        except (OSError, msgspec.MsgspecError):
            return None


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t); NaN for fewer than two."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return math.nan, math.nan
    if len(found) == 1:
        return found[0], math.nan
    return fmean(found), _STUDENT_95[min(len(found), len(_STUDENT_95)) - 1] * stdev(found) / math.sqrt(len(found))
