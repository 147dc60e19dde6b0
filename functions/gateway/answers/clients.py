"""Who asks: by API key where keys are configured, else by the address that the platform's own proxies saw.

Each proxy adds to the end of X-Forwarded-For who spoke to it. What stands before their entries the client wrote itself, and
might write anew for each request, to have a queue of its own each time.
"""

from typing import Final

from flask import Request

from eventing.problems import Unauthorized
from functions.gateway.answers.authentication import KeyRing

_LONGEST_ADDRESS: Final = 64


class Clients:
    """proxies: that every request passes."""

    def __init__(self, keys: KeyRing, proxies: int = 0) -> None:
        self._keys = keys
        self._proxies = proxies

    def identify(self, request: Request) -> str:
        """An id to share the pipeline fairly by; no secret. Raises Unauthorized."""
        if self._keys.is_open:
            return self._seen_by_the_first_proxy(request) or request.remote_addr or "unknown"
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        found = self._keys.find(given.strip())
        if scheme.lower() != "bearer" or found is None:
            seen = "another key" if given else "no Authorization header"
            raise Unauthorized(f"{seen}; send Authorization: Bearer with one of the gateway's API keys")
        return found.id

    def _seen_by_the_first_proxy(self, request: Request) -> str:
        """Empty where there are fewer entries than proxies."""
        entries = request.headers.get("X-Forwarded-For", "").split(",")
        return entries[-self._proxies].strip()[:_LONGEST_ADDRESS] if 0 < self._proxies <= len(entries) else ""
