"""Cross-Origin Resource Sharing (Fetch Standard, section 3.2): which pages a browser lets ask, and read what they are told.

Off, a page of another origin is told nothing and reads nothing. Keys come in a header that pages must set themselves, and no
cookies are looked at, so that credentials are never allowed.
"""

from collections.abc import Sequence
from typing import Final

from flask import Flask, Response, request

_METHODS: Final = "GET, POST, OPTIONS"
_EXPOSED: Final = "X-Request-Id, Retry-After"
_MAX_AGE_SECONDS: Final = 600


class CrossOrigin:
    """origins: as browsers write them in `Origin`; `*` for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    def register(self, app: Flask) -> None:
        app.after_request(self._told)

    def _told(self, response: Response) -> Response:
        origin = request.headers.get("Origin", "")
        response.vary.add("Origin")
        if not origin or not self._origins & {origin, "*"}:
            return response
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            asked = request.headers.get("Access-Control-Request-Headers")
            if asked:
                response.headers["Access-Control-Allow-Headers"] = asked
            response.headers["Access-Control-Max-Age"] = str(_MAX_AGE_SECONDS)
        return response
