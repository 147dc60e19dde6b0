"""Batches of clients as objects in the store: what the client asked for, how far the batch is, and how it ended.

    {prefix}/open/{owner}/{id}                     says that the batch has not ended; written first, deleted last
    {prefix}/{owner}/batches/{id}.json             what was asked for; written once
    {prefix}/{owner}/cancels/{id}.json             the client has cancelled it
    {prefix}/{owner}/runs/{id}/results/00000000 …  results of each part of the input (results.py)
    {prefix}/{owner}/runs/{id}/work/00000000 …     results so far of a part that is not finished
    {prefix}/{owner}/runs/{id}/leases/00000000 …   a gateway works on the part
    {prefix}/{owner}/runs/{id}/sums.json           counts of the first parts; saves reading their results again
    {prefix}/{owner}/ends/{id}.json                how it ended; written when the results are complete

A part is a run of whole lines of the input file. Several gateways may compute the same part. They write the same results,
because ids, seeds and times follow from the batch and the line. So it does not matter which gateway writes last.
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
    """The event that began a batch, if an event did."""

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
    """Counts of lines, tokens and bytes over the first `parts` parts of a batch."""

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
    """An object whose key alone has a meaning: a batch is open or cancelled, or a gateway works on a part."""

    at: int  # in Unix time


class Batches:
    """Stores and finds the batches of all owners. Thread-safe.

    Methods raise NotFound for a batch of another owner or an unknown one, or a StorageError.
    """

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
        """Creates a batch and returns it.

        `window` is the completion window, as the client wrote it and in seconds. If `id_` is None, the batch gets a new id. If
        `created_at` is None, the batch is created now.
        """
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
        """Returns the newest batches, at most `limit`, and whether there are more.

        The list begins after the id `after`, or with the newest if `after` is empty.
        """
        return listed(self.objects, f"{owner}/batches/", BatchJob, after, limit)

    def open(self) -> Iterator[tuple[tuple[str, str], datetime]]:
        """Yields owner and id of each batch that has not ended, and the time at which it was opened."""
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
        """Ends a batch whose results are complete: writes the manifests of its output and error files, and then its end."""
        sums = end.sums
        self._add_file(job, "output", sums.answered, sums.output_bytes, end.at)
        self._add_file(job, "errors", sums.failed, sums.error_bytes, end.at)
        if self.files.retention_seconds:
            self.files.expire_at(end.at + self.files.retention_seconds, job.owner, job.id)
        self.objects.put(f"{job.owner}/ends/{job.id}.json", end)

    def _add_file(self, job: BatchJob, content: ResultsContent, lines: int, size: int, created_at: int) -> None:
        """Writes the manifest of an output or error file, if the file has lines."""
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
        """Deletes the files and batches that have expired. `now` is a Unix time. Several gateways may call it at once.

        A file that an open batch reads is deleted only after that batch has ended.
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
        """Yields the output file and the error file of a batch that has ended, if they exist."""
        for content in RESULTS:
            with suppress(NotFound):
                yield self.files.get(job.owner, results_file_id(job.id, content))

    def close(self, owner: str, id_: str) -> None:
        """Deletes the objects that gateways need only while they work on a batch. Call it when the batch has ended."""
        run = f"{owner}/runs/{id_}/"
        for folder in ("work/", "leases/"):
            self.objects.delete_folder(run + folder)
        self.objects.delete(f"{run}sums.json")
        self.objects.delete(f"open/{owner}/{id_}")

    def reads(self, owner: str, file_id: str) -> str | None:
        """Returns the id of an open batch that reads this file; None if there is none."""
        for name in self.objects.names(f"open/{owner}/"):
            job = self.find(owner, name)
            if job is not None and job.input_file_id == file_id:
                return job.id
        return None

    def sums(self, job: BatchJob) -> Sums:
        """Returns the stored counts of the first parts, which may be older than the results."""
        return self.objects.find(f"{job.owner}/runs/{job.id}/sums.json", Sums) or Sums()

    def head(self, job: BatchJob, name: str, folder: str = "results") -> ResultsHead | None:
        """Returns the counts of one part of the batch; None if it has no results.

        `folder` is `results`, or `work` for a part that is not finished.
        """
        data = bytearray(HEAD_BYTES)
        key = f"{self.objects.prefix}{job.owner}/runs/{job.id}/{folder}/{name}"
        try:
            self.objects.store.read_range_into(key, 0, memoryview(data))
        except (ObjectNotFound, UnexpectedAnswer, ObjectAltered):  # none, or shorter than any results
            return None
        return read_head(bytes(data))

    def progress(self, job: BatchJob) -> Sums:
        """Returns the counts of all lines that are answered so far. Their `parts` has no meaning."""
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
