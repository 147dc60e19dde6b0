"""The routes `/v1/files`: files that batches read, and files with their results."""

import re
from collections.abc import Callable, Iterator
from typing import IO, Any, Final, TypeVar, cast

from flask import Blueprint, Response, request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from eventing.problems import InvalidRequest, MalformedEvent
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.authentication import Clients
from functions.gateway.jobs.batches import Batches
from functions.gateway.jobs.files import EVERYBODY, ClientFile
from functions.hosting.web import json_response

UPLOAD_PATH: Final = "/v1/files"
MAX_KEPT_SECONDS: Final = 10 * 365 * 86_400  # until a file is deleted
_MAX_LISTED: Final = 1000
_READ_BYTES: Final = 2**16
_MAX_FIELD_BYTES: Final = 2**12
_MAX_NAME_CHARACTERS: Final = 256
_MAX_PARTS: Final = 16
_PURPOSES: Final = {"input": "batch", "output": "batch_output", "errors": "batch_output"}

T = TypeVar("T")


class FilesAPI:
    """Answers requests to `/v1/files`.

    A client sees the files of its API key. At a gateway without keys all clients see all files.
    """

    def __init__(self, batches: Batches, clients: Clients) -> None:
        self._batches = batches
        self._files = batches.files
        self._clients = clients

    def register(self, routes: Blueprint) -> None:
        routes.post("/files", endpoint="upload")(self._upload)
        routes.get("/files", endpoint="files")(self._list)
        routes.get("/files/<id>", endpoint="file")(self._document)
        routes.get("/files/<id>/content", endpoint="content")(self._content)
        routes.delete("/files/<id>", endpoint="delete_file")(self._delete)

    def _upload(self) -> Response:
        owner = owner_of_request(self._clients)
        fields, file = read_upload(
            cast("Any", request.environ["wsgi.input"]),
            request.content_type or "",
            lambda filename, pieces: self._files.write(owner, filename, pieces),
        )
        try:
            if fields.get("purpose") != "batch":
                raise InvalidRequest(f"the purpose of the file is {fields.get('purpose')!r}; served is 'batch'")
            kept_seconds = _kept_seconds(fields)
        except InvalidRequest:
            self._files.drop(owner, file)
            raise
        return json_response(file_document(self._files.add(owner, file, kept_seconds)))

    def _list(self) -> Response:
        owner, (after, limit) = owner_of_request(self._clients), page_of_request(_MAX_LISTED)
        purpose = request.args.get("purpose")
        files, has_more = self._files.list(owner, after, limit, lambda file: purpose in (None, _PURPOSES[file.content]))
        return json_response(list_document([file_document(file) for file in files], has_more=has_more))

    def _document(self, id: str) -> Response:
        file = self._files.get(owner_of_request(self._clients), id)
        return json_response(file_document(file))

    def _content(self, id: str) -> Response:
        owner = owner_of_request(self._clients)
        file = self._files.get(owner, id)
        return Response(self._files.read(owner, file), content_type="application/octet-stream")

    def _delete(self, id: str) -> Response:
        owner = owner_of_request(self._clients)
        if (reader := self._batches.reads(owner, id)) is not None:
            raise InvalidRequest(f"{reader} reads the file and has not ended; cancel it first, or wait")
        self._files.get(owner, id)
        self._files.delete(owner, id)
        return json_response({"id": id, "object": "file", "deleted": True})


def _kept_seconds(fields: dict[str, str]) -> int | None:
    """Returns how many seconds after its creation a file shall be deleted, from the form's `expires_after`.

    Returns None if the form has no such field.
    """
    anchor, said = fields.get("expires_after[anchor]", "created_at"), fields.get("expires_after[seconds]")
    if said is None:
        return None
    if anchor != "created_at" or not re.fullmatch("[0-9]{1,10}", said) or not 0 < int(said) <= MAX_KEPT_SECONDS:
        raise InvalidRequest(
            f"expires_after is {said[:20]!r} after {anchor[:40]!r}; it is 1 to {MAX_KEPT_SECONDS} seconds after 'created_at'"
        )
    return int(said)


def owner_of_request(clients: Clients) -> str:
    """Returns the owner of files and batches for the current request: the API key's id, or EVERYBODY. Raises Unauthorized."""
    client_id = log_entry().client_id = clients.identify(request)
    return client_id if clients.are_known else EVERYBODY


def page_of_request(most: int, default: int | None = None) -> tuple[str, int]:
    """Returns the query's `after`, and its `limit` but at most `most`.

    A query without a limit gets `default`, or `most` if that is None. Raises InvalidRequest.
    """
    said = request.args.get("limit", str(default or most))
    if not re.fullmatch("[0-9]{1,6}", said) or not int(said):
        raise InvalidRequest(f"limit is {said[:40]!r}; it is a number from 1 on")
    return request.args.get("after", ""), min(int(said), most)


def list_document(documents: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    ids = [document["id"] for document in documents] or [None]
    return {"object": "list", "data": documents, "has_more": has_more, "first_id": ids[0], "last_id": ids[-1]}


def file_document(file: ClientFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": _PURPOSES[file.content],
        "status": "processed",
        "expires_at": file.expires_at,
    }


def read_upload(body: IO[bytes], content_type: str, take: Callable[[str, Iterator[bytes]], T]) -> tuple[dict[str, str], T]:
    """Reads a file out of a multipart/form-data body (RFC 7578) while the body arrives.

    Returns the form's fields, and what `take` returned. `take` is called once, with the name and the content, piece by piece,
    of the form's field `file`; content that it does not read is skipped. Raises MalformedEvent for a body that is no such form,
    and the errors of reading the body.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise MalformedEvent(f"the content type is {kind[:80]!r}; send the file as multipart/form-data")
    events = _events(body, options["boundary"])
    fields: dict[str, str] = {}
    taken: list[T] = []
    for event in events:
        if isinstance(event, File) and event.name == "file" and not taken:
            content = _content(events)
            taken.append(take(event.filename[:_MAX_NAME_CHARACTERS], content))
            for _ in content:
                pass
        elif isinstance(event, Field):
            value = b""
            for piece in _content(events):
                value += piece
                if len(value) > _MAX_FIELD_BYTES:
                    raise MalformedEvent(f"the form's field {event.name[:80]!r} has more than {_MAX_FIELD_BYTES} bytes")
            fields[event.name] = value.decode("utf-8", "replace")
    if not taken:
        raise MalformedEvent("the form has no file; send one as the field `file`")
    return fields, taken[0]


def _content(events: Iterator[Event]) -> Iterator[bytes]:
    """Yields the data of the field or file whose head is the last event read from `events`."""
    for event in events:
        if not isinstance(event, Data):
            raise MalformedEvent("the form's parts do not follow each other")
        yield event.data
        if not event.more_data:
            return


def _events(body: IO[bytes], boundary: str) -> Iterator[Event]:
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=_MAX_PARTS)
    try:
        while True:
            event = decoder.next_event()
            if isinstance(event, NeedData):
                decoder.receive_data(body.read(_READ_BYTES) or None)
            elif isinstance(event, Epilogue):
                return
            else:
                yield event
    except (ValueError, RequestEntityTooLarge) as error:
        raise MalformedEvent(f"the body is no form of at most {_MAX_PARTS} parts ({error}); send it again") from error
