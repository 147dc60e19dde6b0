"""The routes `/v1/batches`: batches of requests that are answered within a window, when live traffic leaves capacity."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from flask import Blueprint, Response, request
from msgspec import Meta, Struct

from eventing.problems import InvalidRequest
from functions.gateway.answers.authentication import Clients
from functions.gateway.jobs.batches import Batches, BatchJob
from functions.gateway.jobs.files import named_id, results_file_id
from functions.gateway.jobs.files_api import MAX_KEPT_SECONDS, list_document, owner_of_request, page_of_request
from functions.gateway.jobs.lines import BATCH_ENDPOINTS
from functions.gateway.openai.validation import read_request
from functions.hosting.web import json_response

MAX_WINDOW_SECONDS: Final = 7 * 86_400
_MAX_LISTED: Final = 100
_LISTED: Final = 20
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

ShortText = Annotated[str, Meta(max_length=512)]


class ExpiresAfter(Struct, frozen=True, forbid_unknown_fields=True):
    """When a file is deleted: `seconds` after its creation."""

    seconds: Annotated[int, Meta(ge=1, le=MAX_KEPT_SECONDS)]
    anchor: Literal["created_at"] = "created_at"


class BatchRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], ShortText], Meta(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


@dataclass(frozen=True, slots=True)
class BatchesAPI:
    """Answers requests to `/v1/batches`.

    A client sees the batches of its API key. At a gateway without keys all clients see all batches.
    """

    _batches: Batches
    _clients: Clients
    _changed: Callable[[], object]  # called when a batch was created or cancelled

    def register(self, routes: Blueprint) -> None:
        routes.post("/batches", endpoint="create_batch")(self._create)
        routes.get("/batches", endpoint="batches")(self._list)
        routes.get("/batches/<id>", endpoint="batch")(self._one)
        routes.post("/batches/<id>/cancel", endpoint="cancel_batch")(self._cancel)

    def _create(self) -> Response:
        owner = owner_of_request(self._clients)
        data = request.get_data(cache=False)
        asked = read_request(data, BatchRequest)
        key, id_ = request.headers.get("Idempotency-Key"), None
        if key:
            id_ = named_id("batch_", owner, key, hashlib.sha256(data).hexdigest())
            if (begun := self._batches.find(owner, id_)) is not None:
                return json_response(self._document(begun))
        if asked.endpoint not in BATCH_ENDPOINTS:
            raise InvalidRequest(f"endpoint is {asked.endpoint[:80]!r}; batches may ask {', '.join(BATCH_ENDPOINTS)}")
        window = asked.completion_window, window_seconds(asked.completion_window)
        file = self._batches.files.get(owner, asked.input_file_id)
        if file.content != "input" or not file.lines:
            raise InvalidRequest(f"{file.id} has no requests; name a file that was sent with the purpose 'batch'")
        kept = None if asked.output_expires_after is None else asked.output_expires_after.seconds
        client_id = self._clients.identify(request)
        job = self._batches.create(
            owner, client_id, file, asked.endpoint, window, asked.metadata, id_=id_, output_expires_seconds=kept
        )
        self._changed()
        return json_response(self._document(job))

    def _list(self) -> Response:
        owner, (after, limit) = owner_of_request(self._clients), page_of_request(_MAX_LISTED, _LISTED)
        jobs, has_more = self._batches.list(owner, after, limit)
        return json_response(list_document([self._document(job) for job in jobs], has_more=has_more))

    def _one(self, id: str) -> Response:
        job = self._batches.get(owner_of_request(self._clients), id)
        return json_response(self._document(job))

    def _cancel(self, id: str) -> Response:
        job = self._batches.get(owner_of_request(self._clients), id)
        self._batches.cancel(job)
        self._changed()
        return json_response(self._document(job))

    def _document(self, job: BatchJob) -> dict[str, Any]:
        end, cancelled_at = self._batches.end_of(job), self._batches.cancelled_at(job)
        sums = self._batches.progress(job) if end is None else end.sums
        done = sums.answered + sums.failed
        if end is not None:
            status: str = end.status
        elif cancelled_at is not None:
            status = "cancelling"
        else:
            status = "finalizing" if done >= job.lines else "in_progress"

        def ended(as_: str) -> int | None:
            return end.at if end is not None and end.status == as_ else None

        return {
            "id": job.id,
            "object": "batch",
            "endpoint": job.endpoint,
            "errors": None,
            "input_file_id": job.input_file_id,
            "completion_window": job.completion_window,
            "status": status,
            "output_file_id": results_file_id(job.id, "output") if end is not None and sums.answered else None,
            "error_file_id": results_file_id(job.id, "errors") if end is not None and sums.failed else None,
            "created_at": job.created_at,
            "in_progress_at": job.created_at,
            "expires_at": job.expires_at,
            "finalizing_at": ended("completed"),
            "completed_at": ended("completed"),
            "failed_at": None,
            "expired_at": ended("expired"),
            "cancelling_at": cancelled_at,
            "cancelled_at": ended("cancelled"),
            "request_counts": {"total": job.lines, "completed": sums.answered, "failed": sums.failed},
            "usage": {
                "input_tokens": sums.input_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sums.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": sums.input_tokens + sums.output_tokens,
            },
            "metadata": job.metadata,
        }


def window_seconds(text: str) -> int:
    """Returns the seconds of a completion window such as 24h. Raises InvalidRequest."""
    found = re.fullmatch("([0-9]{1,6})([smhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= MAX_WINDOW_SECONDS:
        raise InvalidRequest(f"completion_window is {text[:40]!r}; it is a number with s, m, h or d, such as 24h, at most 7d")
    return seconds
