"""One open batch as this gateway sees it: which parts of its input have results, and which parts other gateways work on."""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from functions.gateway.jobs.batches import WINDOW_PARTS, BatchEnd, Batches, BatchJob, EndStatus, Mark, Sums
from functions.gateway.jobs.files import part_lines, part_name
from functions.gateway.jobs.lines import LinePlace, unanswered
from functions.gateway.jobs.results import PartResults
from storage.errors import ObjectNotFound

LEASE_SECONDS: Final = 10.0  # a gateway that has not renewed its lease for so long is taken for dead
END: Final = "end"  # the lease of the gateway that ends the batch
_CHOICES: Final = 8  # a part is drawn from so many, so that gateways seldom choose the same one
_LOST_SECONDS: Final = 600.0  # a part of the input that the store lacks so long after the window is lost
_IDLE_SHARE: Final = 0.1  # of the window, in which live traffic goes first in any case

_WHY: Final = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered"),
    "expired": ("batch_expired", "the batch's completion window ended before this line was answered"),
}


class BatchRun:
    """An open batch: how far it is, and which gateway works on which part. Methods that use the store raise a StorageError.

    The worker's lock guards `look`, `next_part`, `taken` and `finished`. While `ending` is set, only the thread that runs `end`
    changes this object, and `look` is not called. The clocks of gateways and store should differ by less than LEASE_SECONDS.
    Otherwise leases expire too early or too late, and parts are computed several times, or late.
    """

    def __init__(self, batches: Batches, job: BatchJob) -> None:
        self.job = job
        self.sums: Sums = batches.sums(job)  # of the parts before the first one without results
        self.taken: set[int] = set()  # parts that this gateway works on
        self.ending = False  # this gateway ends the batch
        self.closed = False  # the batch has ended
        self.status: EndStatus = "completed"  # how it ended, after `end`
        self.cancelled_at: int | None = None
        self._paused_until = 0.0  # in time.monotonic()
        self._batches = batches
        self._folder = f"{job.owner}/runs/{job.id}/"
        self.finished: set[int] = set()  # parts after the first ones that have results
        self._leases: dict[str, tuple[datetime, float]] = {}  # when each was written, and when that was first seen here

    @property
    def complete(self) -> bool:
        return self.sums.parts >= self.job.parts

    @property
    def stopped_as(self) -> EndStatus | None:
        """How the batch ends early, cancelled or expired; None if it has not been stopped."""
        if self.cancelled_at is not None:
            return "cancelled"
        return "expired" if time.time() >= self.job.expires_at else None

    def goes_on(self) -> bool:
        """Returns whether lines of the batch may be answered now."""
        return not self.closed and self.stopped_as is None and time.monotonic() >= self._paused_until

    def pause(self, seconds: float) -> None:
        """Stops answering lines of the batch for `seconds`."""
        self._paused_until = time.monotonic() + seconds

    def may_end(self) -> bool:
        """Returns whether the batch can be ended now; never while it pauses after a failure.

        A complete batch can be ended at once. A stopped one can be ended after LEASE_SECONDS, in which gateways give up their
        parts.
        """
        if time.monotonic() < self._paused_until:
            return False
        if self.complete:
            return True
        since = self.job.expires_at if self.cancelled_at is None else self.cancelled_at
        return self.stopped_as is not None and time.time() >= min(since, self.job.expires_at) + LEASE_SECONDS

    def due(self) -> bool:
        """Returns whether the batch is so late that it no longer gives way to all live traffic."""
        elapsed = (time.time() - self.job.created_at) / self.job.window_seconds
        return elapsed > _IDLE_SHARE + (1 - 2 * _IDLE_SHARE) * self.sums.parts / max(1, self.job.parts)

    def look(self) -> None:
        batches, objects = self._batches, self._batches.objects
        self.cancelled_at = batches.cancelled_at(self.job)
        before = self.sums.parts
        for name in objects.names(f"{self._folder}results/", part_name(before - 1) if before else ""):
            if int(name) >= before + WINDOW_PARTS:
                break
            self.finished.add(int(name))
        self._advance()
        if self.sums.parts != before:
            objects.put(f"{self._folder}sums.json", self.sums)
        now = time.monotonic()
        prefix = f"{objects.prefix}{self._folder}leases/"
        leases = {found.key.removeprefix(prefix): found.modified for found in objects.store.list(prefix)}
        known = self._leases
        self._leases = {
            name: known[name] if name in known and known[name][0] == written else (written, now)
            for name, written in leases.items()
        }

    def next_part(self) -> int | None:
        """Returns the number of a part that has no results and on which no gateway works; None if there is none now."""
        window = range(self.sums.parts, min(self.job.parts, self.sums.parts + WINDOW_PARTS))
        free = (number for number in window if number not in self.finished and number not in self.taken)
        found = []
        for number in free:
            if not self.is_leased(part_name(number)):
                found.append(number)
            if len(found) == _CHOICES:
                break
        return random.choice(found) if found else None

    def is_leased(self, name: str) -> bool:
        """Returns whether another gateway has the lease `name`: it works on that part, or ends the batch."""
        if name not in self._leases:
            return False
        written, seen = self._leases[name]
        age = (datetime.now(UTC) - written).total_seconds()
        return age < LEASE_SECONDS and time.monotonic() - seen < LEASE_SECONDS

    def lease(self, name: str) -> None:
        """Takes or renews a lease. Two gateways may take the same one at once; they then write the same results."""
        self._batches.objects.put(f"{self._folder}leases/{name}", Mark(int(time.time())))

    def release(self, name: str) -> None:
        self._batches.objects.delete(f"{self._folder}leases/{name}")

    def read_part(self, number: int) -> tuple[list[bytes], PartResults, bool]:
        """Returns the lines of a part, its results so far, and whether the results are complete.

        If they are complete, the list of lines is empty.
        """
        job, files, name = self.job, self._batches.files, part_name(number)
        whole = files.results(job.owner, job.id, name)
        if whole is not None:
            return [], whole, True
        lines = part_lines(files.part(job.owner, job.input_file_id, number))
        return lines, files.results(job.owner, job.id, name, "work") or PartResults(), False

    def store(self, folder: str, number: int, results: PartResults) -> None:
        """Stores results of a part in `folder`.

        `folder` is `work` if the part is not finished: if this gateway dies, another one continues from there.
        """
        self._batches.objects.put(f"{self._folder}{folder}/{part_name(number)}", results.encode())

    def store_part(self, number: int, results: PartResults) -> None:
        """Stores the complete results of a part, unless the store has some already."""
        if self._batches.head(self.job, part_name(number)) is None and self._batches.end_of(self.job) is None:
            self.store("results", number, results)
        self._batches.objects.delete(f"{self._folder}work/{part_name(number)}")

    def end(self, stopping: Callable[[], bool]) -> bool:
        """Ends a batch for which `may_end` is true: every line without an answer gets an error.

        Returns whether the batch was ended. Returns False if `stopping` returns True because this gateway shuts down; another
        gateway then continues.
        """
        batches, job = self._batches, self.job
        ended = batches.end_of(job)
        self.status = "completed" if self.complete else self.stopped_as or "expired" if ended is None else ended.status
        if ended is None:
            status = self.status
            renewed = 0.0
            while not self.complete:
                if stopping():
                    return False
                if time.monotonic() - renewed > LEASE_SECONDS / 3:
                    self.lease(END)
                    renewed = time.monotonic()
                number = self.sums.parts
                if batches.head(job, part_name(number)) is None:
                    self._give_up(number, *_WHY[status])
                self.finished.add(number)
                self._advance()
            batches.finish(job, BatchEnd(status=status, at=int(time.time()), sums=self.sums))
        return True

    def _give_up(self, number: int, code: str, message: str) -> None:
        try:
            lines, results, _ = self.read_part(number)
        except ObjectNotFound:
            is_deleted = self._batches.files.find(self.job.owner, self.job.input_file_id) is None
            if not is_deleted and time.time() < self.job.expires_at + _LOST_SECONDS:
                raise  # the store does not show a part for now: the batch is ended later
            lines, results = [], PartResults()
        for index, line in enumerate(lines):
            if index not in results:
                results.add(index, unanswered(LinePlace(self.job, number, index, line), code, message))
        self.store("results", number, results)

    def _advance(self) -> None:
        """Adds the counts of further finished parts to `sums`, as long as they follow the first parts without a gap."""
        while (number := self.sums.parts) in self.finished:
            head = self._batches.head(self.job, part_name(number))
            self.finished.discard(number)
            if head is None:  # a store showed a part of an object
                return
            self.sums = self.sums.plus(head)
