"""Batches of clients as objects: what was asked for, how far it is, and how it ended.

    {prefix}/open/{owner}/{id}                     says that the batch has not ended; written first, deleted last
    {prefix}/{owner}/batches/{id}.json             what was asked for; written once
    {prefix}/{owner}/cancels/{id}.json             the client has cancelled it
    {prefix}/{owner}/runs/{id}/results/00000000 …  results of each part of the input (results.py)
    {prefix}/{owner}/runs/{id}/work/00000000 …     results so far of a part that is not finished
    {prefix}/{owner}/runs/{id}/leases/00000000 …   a gateway works on the part
    {prefix}/{owner}/runs/{id}/sums.json           counts of the first parts; saves reading their results again
    {prefix}/{owner}/ends/{id}.json                how it ended; written when the results are complete

Several gateways may compute the same part. They write the same results, because ids, seeds and times follow from the batch and
the line, so it does not matter whose are written last.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Final, Literal

from msgspec import Struct

from eventing.problems import NotFound
from functions.gateway.jobs.files import (
    EXPIRIES,
    ClientFile,
    Files,
    JobObjects,
    check_id,
    listed,
    new_id,
    part_name,
    results_file_id,
)
from functions.gateway.jobs.results import HEAD_BYTES, RESULTS, ResultsContent, ResultsHead, read_head
from storage.errors import ObjectAltered, ObjectNotFound, UnexpectedAnswer

WINDOW_PARTS: Final = 128  # so many parts after the first unfinished one are worked on, whatever the length of the batch


class Cause(Struct, frozen=True):
    """The event that began a batch."""

    id: str
    source: str
    traceparent: str | None = None


class BatchJob(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A batch as its client asked for it."""

    id: str
    owner: str
    client_id: str  # whose budgets the tokens count for
    endpoint: str
    input_file_id: str
    lines: int
    parts: int
    created_at: int  # in Unix time
    completion_window: str
    window_seconds: int
    metadata: dict[str, str] | None = None
    cause: Cause | None = None
    output_expires_seconds: int | None = None  # after which its files are deleted; None: as all files

    @property
    def expires_at(self) -> int:
        return self.created_at + self.window_seconds


class Sums(Struct, frozen=True, kw_only=True):
    """Counts of the first `parts` parts of a batch."""

    parts: int = 0
    answered: int = 0
    failed: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def plus(self, head: ResultsHead) -> "Sums":
        return Sums(
            parts=self.parts + 1,
            answered=self.answered + len(head.answered),
            failed=self.failed + len(head.failed),
            output_bytes=self.output_bytes + head.output_bytes,
            error_bytes=self.error_bytes + head.error_bytes,
            input_tokens=self.input_tokens + head.input_tokens,
            output_tokens=self.output_tokens + head.output_tokens,
        )


EndStatus = Literal["completed", "cancelled", "expired"]


class BatchEnd(Struct, frozen=True, kw_only=True):
    status: EndStatus
    at: int  # in Unix time
    sums: Sums


class Mark(Struct, frozen=True):
    """An object whose key says all: a batch is open or cancelled, or a gateway works on a part."""

    at: int  # in Unix time


class Batches:
    """The batches of all owners. Thread-safe. Methods raise NotFound for a batch that is not the owner's, or a StorageError."""

    def __init__(self, objects: JobObjects, files: Files) -> None:
        self.objects = objects
        self.files = files

    def create(
        self,
        owner: str,
        client_id: str,
        file: ClientFile,
        endpoint: str,
        window: tuple[str, int],
        metadata: dict[str, str] | None = None,
        *,
        id_: str | None = None,
        created_at: int | None = None,
        cause: Cause | None = None,
        output_expires_seconds: int | None = None,
    ) -> BatchJob:
        """window: as the client wrote it, and in seconds. id_: None: a new one. created_at: None: now."""
        job = BatchJob(
            id=id_ or new_id("batch_"),
            owner=owner,
            client_id=client_id,
            endpoint=endpoint,
            input_file_id=file.id,
            lines=file.lines,
            parts=file.parts,
            created_at=int(time.time()) if created_at is None else created_at,
            completion_window=window[0],
            window_seconds=window[1],
            metadata=metadata,
            cause=cause,
            output_expires_seconds=output_expires_seconds,
        )
        self.objects.put(f"open/{owner}/{job.id}", Mark(job.created_at))
        self.objects.put(f"{owner}/batches/{job.id}.json", job)
        return job

    def get(self, owner: str, id_: str) -> BatchJob:
        check_id(id_)
        job = self.find(owner, id_)
        if job is None:
            raise NotFound(f"there is no batch {id_!r} of this API key")
        return job

    def find(self, owner: str, id_: str) -> BatchJob | None:
        return self.objects.find(f"{owner}/batches/{id_}.json", BatchJob)

    def list(self, owner: str, after: str, limit: int) -> tuple[list[BatchJob], bool]:
        """The newest batches after `after` (an id; empty: all), and whether there are more."""
        return listed(self.objects, f"{owner}/batches/", BatchJob, after, limit)

    def open(self) -> Iterator[tuple[tuple[str, str], datetime]]:
        """Owner and id of all batches that have not ended, and when each was opened."""
        prefix = f"{self.objects.prefix}open/"
        for found in self.objects.store.list(prefix):
            owner, _, id_ = found.key.removeprefix(prefix).partition("/")
            yield (owner, id_), found.modified

    def cancel(self, job: BatchJob) -> None:
        if self.end_of(job) is None and self.cancelled_at(job) is None:
            self.objects.put(f"{job.owner}/cancels/{job.id}.json", Mark(int(time.time())))

    def cancelled_at(self, job: BatchJob) -> int | None:
        found = self.objects.find(f"{job.owner}/cancels/{job.id}.json", Mark)
        return None if found is None else found.at

    def end_of(self, job: BatchJob) -> BatchEnd | None:
        return self.objects.find(f"{job.owner}/ends/{job.id}.json", BatchEnd)

    def finish(self, job: BatchJob, end: BatchEnd) -> None:
        """Makes the batch end, whose results must be complete: writes the manifests of its files, and the end after them."""
        sums = end.sums
        self._add_file(job, "output", sums.answered, sums.output_bytes, end.at)
        self._add_file(job, "errors", sums.failed, sums.error_bytes, end.at)
        if self.files.retention_seconds:
            self.files.expire_at(end.at + self.files.retention_seconds, job.owner, job.id)
        self.objects.put(f"{job.owner}/ends/{job.id}.json", end)

    def _add_file(self, job: BatchJob, content: ResultsContent, lines: int, size: int, created_at: int) -> None:
        """Writes the manifest of a file of results, if it has lines."""
        if not lines:
            return
        file = ClientFile(
            id=results_file_id(job.id, content),
            filename=f"{job.id}_{content}.jsonl",
            bytes=size,
            created_at=created_at,
            lines=lines,
            content=content,
            batch_id=job.id,
        )
        self.files.add(job.owner, file, job.output_expires_seconds)

    def expire(self, now: float) -> None:
        """Deletes the files and batches that have expired. Several gateways may do so at once. now: in Unix time.

        A file that an open batch reads stays until that has ended.
        """
        for name in self.objects.names(EXPIRIES):
            at, _, rest = name.partition("/")
            owner, _, id_ = rest.partition("/")
            if not at.isdecimal() or int(at) > now:
                return
            if id_.startswith("file-"):
                if self.reads(owner, id_) is not None:
                    continue
                self.files.delete(owner, id_)
            else:
                for folder in ("ends", "cancels", "batches"):
                    self.objects.delete(f"{owner}/{folder}/{id_}.json")
            self.objects.delete(EXPIRIES + name)

    def results_files(self, job: BatchJob) -> Iterator[ClientFile]:
        """The output and the error file of a batch that has ended, as far as it has them."""
        for content in RESULTS:
            with suppress(NotFound):
                yield self.files.get(job.owner, results_file_id(job.id, content))

    def close(self, owner: str, id_: str) -> None:
        """Deletes what only gateways that work on a batch need. Call it when the batch has ended."""
        run = f"{owner}/runs/{id_}/"
        for folder in ("work/", "leases/"):
            self.objects.delete_folder(run + folder)
        self.objects.delete(f"{run}sums.json")
        self.objects.delete(f"open/{owner}/{id_}")

    def reads(self, owner: str, file_id: str) -> str | None:
        """The id of a batch that has not ended and reads this file; None: there is none."""
        for name in self.objects.names(f"open/{owner}/"):
            job = self.find(owner, name)
            if job is not None and job.input_file_id == file_id:
                return job.id
        return None

    def sums(self, job: BatchJob) -> Sums:
        """Counts of the first parts, as a gateway wrote them lately."""
        return self.objects.find(f"{job.owner}/runs/{job.id}/sums.json", Sums) or Sums()

    def head(self, job: BatchJob, name: str, folder: str = "results") -> ResultsHead | None:
        """Counts of one part of the batch; None: it has no results. folder: `results`, or `work` for a part in progress."""
        data = bytearray(HEAD_BYTES)
        key = f"{self.objects.prefix}{job.owner}/runs/{job.id}/{folder}/{name}"
        try:
            self.objects.store.read_range_into(key, 0, memoryview(data))
        except (ObjectNotFound, UnexpectedAnswer, ObjectAltered):  # none, or shorter than any results
            return None
        return read_head(bytes(data))

    def progress(self, job: BatchJob) -> Sums:
        """Counts of all lines that are answered so far; `parts` means nothing."""
        sums, run = self.sums(job), f"{job.owner}/runs/{job.id}/"
        counted = sums.parts
        seen = set()
        for name in self.objects.names(f"{run}results/", part_name(sums.parts - 1) if sums.parts else ""):
            if (head := self.head(job, name)) is not None:
                seen.add(name)
                sums = sums.plus(head)
        for name in self.objects.names(f"{run}work/"):
            if name not in seen and int(name) >= counted and (head := self.head(job, name, "work")) is not None:
                sums = sums.plus(head)
        return sums
