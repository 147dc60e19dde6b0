"""Credentials for a pod without keys: its ServiceAccount token is exchanged for keys that last an hour.

The exchange is `AssumeRoleWithWebIdentity` of the AWS STS API, which MinIO and others offer as well. It needs no boto3, like
all reading in a pod. EKS Pod Identity and the metadata services of machines are not supported.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

from storage.errors import AccessDenied
from storage.store.paced import connect
from storage.store.refusals import error_code, is_transient
from storage.store.settings import StoreSettings

_log = logging.getLogger(__name__)

_SESSION_NAME: Final = "lamina"
_RENEW_BEFORE_SECONDS: Final = 300.0
_STALL_SECONDS: Final = 10.0
_MAX_ANSWER_BYTES: Final = 2**16
_NEEDED: Final = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")


def keys_of(settings: StoreSettings) -> Callable[[], StoreSettings]:
    """Makes a function that returns `settings` with keys that are valid now. Call that function before every request.

    The function raises AccessDenied if the exchange is refused, and OSError if a retry may help.
    """
    return _ExchangedKeys(settings).current if settings.web_identity_token_file else lambda: settings


class _ExchangedKeys:
    """The keys that the token service issued. They are renewed before they expire. Thread-safe."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._endpoint = settings.sts_endpoint or f"https://sts.{settings.region}.amazonaws.com"
        self._place = f"the token service at {self._endpoint}"
        self._lock = threading.Lock()
        self._keyed: StoreSettings | None = None
        self._renew_at = self._good_until = 0.0  # by time.time(), as the service states it

    def current(self) -> StoreSettings:
        with self._lock:
            if self._keyed is None or time.time() >= self._renew_at:
                try:
                    self._exchange()
                except (OSError, HTTPException, AccessDenied) as error:
                    if self._keyed is None or time.time() >= self._good_until:
                        raise
                    _log.warning("keys of the store are not renewed yet, and good for a while: %s", error)
            assert self._keyed is not None
            return self._keyed

    def _exchange(self) -> None:
        path = self._settings.web_identity_token_file or ""
        try:
            token = Path(path).read_text(encoding="ascii").strip()  # read each time: Kubernetes rotates it
        except (OSError, UnicodeDecodeError) as error:
            raise AccessDenied(
                f"AWS_WEB_IDENTITY_TOKEN_FILE: {path} cannot be read ({error}); is its volume mounted?"
            ) from error
        answer = self._ask(token)
        found = {name: re.search(rb"<%b>\s*([^<\s]+)\s*</%b>" % (name.encode(), name.encode()), answer) for name in _NEEDED}
        values = {name: match.group(1).decode() for name, match in found.items() if match}
        if missing := [name for name in _NEEDED if name not in values]:
            raise AccessDenied(f"{self._place} answers without {', '.join(missing)}; is it a security token service?")
        key, secret, session, until = (values[name] for name in _NEEDED)
        self._keyed = replace(self._settings, access_key_id=key, secret_access_key=secret, session_token=session)
        self._good_until = datetime.fromisoformat(until).timestamp()
        self._renew_at = self._good_until - min(_RENEW_BEFORE_SECONDS, (self._good_until - time.time()) / 2)

    def _ask(self, token: str) -> bytes:
        form = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleSessionName": _SESSION_NAME,
            "WebIdentityToken": token,
        }
        if self._settings.role_arn:
            form["RoleArn"] = self._settings.role_arn
        connection = connect(self._endpoint, _STALL_SECONDS)
        try:
            headers = {"content-type": "application/x-www-form-urlencoded"}
            connection.request("POST", urlsplit(self._endpoint).path or "/", urlencode(form).encode(), headers)
            response = connection.getresponse()
            answer, status = response.read(_MAX_ANSWER_BYTES), response.status
        finally:
            connection.close()
        if is_transient(status):
            raise OSError(f"{self._place} answers HTTP {status} {error_code(answer)}".rstrip())
        if status != 200:
            role = self._settings.role_arn or "a role of its policy"
            raise AccessDenied(
                f"{self._place} does not let this pod be {role} (HTTP {status} {error_code(answer)}); look at its trust, "
                f"the ServiceAccount and the audience of {self._settings.web_identity_token_file}"
            )
        return answer
