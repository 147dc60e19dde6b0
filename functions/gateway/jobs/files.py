"""Files of clients as objects in the store: their content in parts of whole lines, and a manifest, which is written last.

    {prefix}/{owner}/files/{id}.json          the manifest; without it the file does not exist
    {prefix}/{owner}/parts/{id}/00000000 …    the content
    {prefix}/expiries/{time}/{owner}/{id}     when to delete a file or a batch; sorts by the Unix time

Output and error files of a batch have a manifest only: their content is the batch's results (results.py). An owner is the id of
an API key, or EVERYBODY at a gateway without keys. Nothing here uses conditional writes, which not all stores support.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from eventing.problems import EventTooLarge, NotFound
from functions.gateway.jobs.results import RESULTS, PartResults, ResultsContent
from storage.errors import ObjectAltered, ObjectNotFound
from storage.store.payload_store import MAX_PAYLOAD_BYTES, PayloadStore

EVERYBODY: Final = "everybody"
EXPIRIES: Final = "expiries/"
MAX_FILE_BYTES: Final = 2**29
PART_LINES: Final = 32  # what a gateway works on at a time, and what is lost when it dies
MAX_LINE_BYTES: Final = 2**20
_PART_BYTES: Final = 2**20  # a part ends at the first line end after so many bytes
_MAX_PART_BYTES: Final = 2**30  # of results, which may have log-probabilities
_ID: Final = re.compile(r"(file-|batch_)[0-9a-f]{27}")
_LATEST_MS: Final = 2**44

T = TypeVar("T")
S = TypeVar("S", bound=Struct)
Content = Literal["input"] | ResultsContent


class ClientFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The manifest of a client's file: its name, size, parts and times."""

    id: str
    filename: str
    bytes: int
    created_at: int  # in Unix time
    lines: int = 0  # that are not blank
    parts: int = 0
    content: Content = "input"
    batch_id: str = ""  # the batch of an output or error file
    expires_at: int | None = None  # in Unix time, when it is deleted; None: it stays


def new_id(prefix: str) -> str:
    """Returns a new id that cannot be guessed. `prefix` is `file-` or `batch_`.

    A later id sorts before an earlier one, so that listings begin with the newest.
    """
    return f"{prefix}{_LATEST_MS - int(time.time() * 1000):011x}{secrets.token_hex(8)}"


def named_id(prefix: str, *names: str) -> str:
    """Returns an id made from a digest of `names`, which is the same for each delivery of an event.

    It sorts at a random place of a listing.
    """
    return prefix + hashlib.sha256("\n".join(names).encode()).hexdigest()[:27]


def check_id(id_: str) -> None:
    """Raises NotFound for an id without the form of this gateway's ids, because it could name any object."""
    if not _ID.fullmatch(id_):
        raise NotFound(f"there is no {id_[:80]!r} of this API key")


class JobObjects:
    """Reads and writes objects under one prefix of the store, small ones as JSON. Thread-safe. Methods raise a StorageError."""

    def __init__(self, store: PayloadStore, prefix: str) -> None:
        self.store = store
        self.prefix = prefix.strip("/") + "/"

    def put(self, key: str, value: Struct | dict[str, str] | bytes) -> None:
        self.store.put(self.prefix + key, value if isinstance(value, bytes) else msgspec.json.encode(value))

    def get(self, key: str, max_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        return self.store.get(self.prefix + key, max_bytes=max_bytes)

    def find(self, key: str, type_: type[T]) -> T | None:
        """Returns the object as a value of `type_`; None if there is no object, or if its bytes are no such value."""
        try:
            return msgspec.json.decode(self.get(key), type=type_)
        except (ObjectNotFound, msgspec.DecodeError):
            return None

    def names(self, folder: str, after: str = "", at_once: int = 1000) -> Iterator[str]:
        """Yields the names in a folder that are greater than `after`, in their order. `folder` ends in `/`."""
        whole = self.prefix + folder
        for found in self.store.list(whole, after=whole + after if after else "", at_once=at_once):
            yield found.key.removeprefix(whole)

    def delete(self, key: str) -> None:
        self.store.delete(self.prefix + key)

    def delete_folder(self, folder: str) -> None:
        for name in self.names(folder):
            self.delete(folder + name)


class Files:
    """Stores and finds the files of all owners. Thread-safe.

    Methods raise NotFound for a file of another owner or an unknown one, or a StorageError.
    """

    def __init__(self, objects: JobObjects, retention_seconds: int = 0) -> None:
        """Files without an expiry of their own are deleted at the age `retention_seconds`; 0 means never."""
        self._objects = objects
        self.retention_seconds = retention_seconds

    def write(self, owner: str, filename: str, pieces: Iterable[bytes], id_: str | None = None) -> ClientFile:
        """Writes the content of a new file in bounded memory. The file does not exist before `add` is called.

        If `id_` is None, the file gets a new id. Raises EventTooLarge, and the errors of `pieces`; the written content is then
        deleted.
        """
        id_ = id_ or new_id("file-")
        folder = f"{owner}/parts/{id_}/"
        total = lines = parts = 0
        try:
            for part in _parts(pieces):
                total += len(part)
                if total > MAX_FILE_BYTES:
                    raise EventTooLarge(f"the file has more than {MAX_FILE_BYTES} bytes; send several")
                self._objects.put(folder + part_name(parts), part)
                lines += len(part_lines(part))
                parts += 1
        except BaseException:
            self._objects.delete_folder(folder)
            raise
        return ClientFile(id=id_, filename=filename, bytes=total, created_at=int(time.time()), lines=lines, parts=parts)

    def add(self, owner: str, file: ClientFile, expires_after_seconds: int | None = None) -> ClientFile:
        """Writes the manifest of a file whose content is written, and returns it. The file exists from then on.

        If `expires_after_seconds` is None, `retention_seconds` is used.
        """
        if seconds := expires_after_seconds or self.retention_seconds:
            file = replace(file, expires_at=file.created_at + seconds)
            self.expire_at(file.created_at + seconds, owner, file.id)
        self._objects.put(f"{owner}/files/{file.id}.json", file)
        return file

    def expire_at(self, at: int, owner: str, id_: str) -> None:
        """Schedules the deletion of a file or a batch at the Unix time `at`."""
        self._objects.put(f"{EXPIRIES}{at:011}/{owner}/{id_}", {})

    def drop(self, owner: str, file: ClientFile) -> None:
        """Deletes the content of a file that was written but will not be added."""
        self._objects.delete_folder(f"{owner}/parts/{file.id}/")

    def get(self, owner: str, id_: str) -> ClientFile:
        check_id(id_)
        file = self.find(owner, id_)
        if file is None or _is_over(file):
            raise NotFound(f"there is no file {id_!r} of this API key")
        return file

    def find(self, owner: str, id_: str) -> ClientFile | None:
        return self._objects.find(f"{owner}/files/{id_}.json", ClientFile)

    def list(
        self, owner: str, after: str, limit: int, wanted: Callable[[ClientFile], bool] = lambda _: True
    ) -> tuple[list[ClientFile], bool]:
        """Returns the newest files that `wanted` accepts, at most `limit`, and whether there are more.

        The list begins after the id `after`, or with the newest if `after` is empty.
        """
        return listed(
            self._objects, f"{owner}/files/", ClientFile, after, limit, lambda file: wanted(file) and not _is_over(file)
        )

    def read(self, owner: str, file: ClientFile) -> Iterator[bytes]:
        """Yields the file's content piece by piece. Raises ObjectAltered if the store does not show all of it."""
        if file.content == "input":
            for number in range(file.parts):
                yield self.part(owner, file.id, number)
            return
        missing = file.bytes
        for name in self._objects.names(f"{owner}/runs/{file.batch_id}/results/"):
            results = self.results(owner, file.batch_id, name)
            if results is not None and (lines := results.lines(file.content)):
                missing -= len(lines)
                yield lines
        if missing > 0:
            raise ObjectAltered(f"the store shows {file.bytes - missing} of the {file.bytes} bytes of {file.id}; read it again")

    def part(self, owner: str, id_: str, number: int) -> bytes:
        """Returns one part of a file that a client sent."""
        return self._objects.get(f"{owner}/parts/{id_}/{part_name(number)}")

    def results(self, owner: str, batch_id: str, name: str, folder: str = "results") -> PartResults | None:
        """Returns the results of one part of a batch; None if there are none."""
        try:
            return PartResults.decode(self._objects.get(f"{owner}/runs/{batch_id}/{folder}/{name}", _MAX_PART_BYTES))
        except ObjectNotFound:
            return None

    def delete(self, owner: str, id_: str) -> None:
        """Deletes a file, if it exists. The results of a batch are deleted with the last of its output and error files."""
        file = self.find(owner, id_)
        if file is None:
            return
        self._objects.delete(f"{owner}/files/{id_}.json")
        self._objects.delete_folder(f"{owner}/parts/{id_}/")
        both = [results_file_id(file.batch_id, content) for content in RESULTS] if file.batch_id else []
        if both and all(self.find(owner, each) is None for each in both):
            self._objects.delete_folder(f"{owner}/runs/{file.batch_id}/results/")


def _is_over(file: ClientFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()


def part_name(number: int) -> str:
    """Returns the name of a part's object. Names sort in the order of the numbers."""
    return f"{number:08}"


def part_lines(part: bytes) -> list[bytes]:
    """Returns the lines of a part that are not blank."""
    return [line for line in part.split(b"\n") if line.strip()]


def results_file_id(batch_id: str, content: ResultsContent) -> str:
    """Returns the id of a batch's output or error file, which is the same at every gateway."""
    digits = batch_id.removeprefix("batch_")
    return f"file-{digits[:-1]}{int(digits[-1], 16) ^ (1 if content == 'output' else 2):x}"


def listed(
    objects: JobObjects, folder: str, type_: type[S], after: str, limit: int, wanted: Callable[[S], bool] = lambda _: True
) -> tuple[list[S], bool]:
    """Returns the newest values in a folder that `wanted` accepts, at most `limit`, and whether there are more.

    The list begins after the id `after`, or with the newest if `after` is empty. Objects that are no value of `type_` are
    skipped.
    """
    if after:
        check_id(after)
    names = objects.names(folder, f"{after}.json" if after else "", at_once=min(limit + 1, 1000))
    found: list[S] = []
    for name in names:
        value = objects.find(folder + name, type_)
        if value is None or not wanted(value):
            continue
        if len(found) == limit:
            return found, True
        found.append(value)
    return found, False


def _parts(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Joins pieces into parts that end at line ends. Raises EventTooLarge for a line of more than MAX_LINE_BYTES."""
    lines: list[bytes] = []
    size, begun = 0, b""
    for piece in pieces:
        *ended, begun = (begun + piece).split(b"\n")
        for line in ended:
            lines.append(line + b"\n")
            size += len(line) + 1
            if len(lines) == PART_LINES or size >= _PART_BYTES:
                yield b"".join(lines)
                lines, size = [], 0
        if len(begun) > MAX_LINE_BYTES:
            raise EventTooLarge(f"a line of the file has more than {MAX_LINE_BYTES} bytes, which are the most")
    if lines or begun:
        yield b"".join([*lines, begun])
