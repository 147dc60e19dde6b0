"""Who asks: by API key where keys are configured, else by the address that the platform's own proxies saw.

Each proxy adds to the end of X-Forwarded-For who spoke to it. What stands before their entries the client wrote itself, and
might write anew for each request, to have a queue of its own each time.
"""

import hmac
from collections.abc import Sequence
from typing import Final

from flask import Request

from eventing.problems import Unauthorized
from functions.gateway.doors.api_keys import HASHED, key_id, sha256_of

_LONGEST_ADDRESS: Final = 64


class Clients:
    """keys: bearer keys or their hashes, any of which is good; none: open to all. proxies: that every request passes."""

    def __init__(self, keys: Sequence[str], proxies: int = 0) -> None:
        self._hashes = [key.removeprefix(HASHED) if key.startswith(HASHED) else sha256_of(key) for key in keys]
        self._proxies = proxies

    def identify(self, request: Request) -> str:
        """An id to share the pipeline fairly by; no secret. Raises Unauthorized."""
        if not self._hashes:
            return self._seen_by_the_first_proxy(request) or request.remote_addr or "unknown"
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # All are compared, so that the time says nothing about which one came close.
        found = sha256_of(given.strip())
        known = [hmac.compare_digest(found, one) for one in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            seen = "another key" if given else "no Authorization header"
            raise Unauthorized(f"{seen}; send Authorization: Bearer with one of the gateway's API keys")
        return key_id(found)

    def _seen_by_the_first_proxy(self, request: Request) -> str:
        """Empty where there are fewer entries than proxies."""
        entries = request.headers.get("X-Forwarded-For", "").split(",")
        return entries[-self._proxies].strip()[:_LONGEST_ADDRESS] if 0 < self._proxies <= len(entries) else ""
