"""Who asks: by API key where keys are configured, else by address."""

import hashlib
import hmac
from collections.abc import Sequence

from flask import Request

from eventing.problems import Unauthorized


class Clients:
    """keys: bearer keys, any of which is good; none: open to all."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def identify(self, request: Request) -> str:
        """An id to share the pipeline fairly by; no secret. Raises Unauthorized."""
        if not self._keys:
            return request.headers.get("X-Forwarded-For", "").partition(",")[0].strip() or request.remote_addr or "unknown"
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # All are compared, so that the time says nothing about which one came close.
        known = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            seen = "another key" if given else "no Authorization header"
            raise Unauthorized(f"{seen}; send Authorization: Bearer with one of the gateway's API keys")
        return hashlib.sha256(self._keys[known.index(True)]).hexdigest()[:12]
