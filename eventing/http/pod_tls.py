"""TLS between pods: the CA to trust, the DNS name in every pod's certificate, and this pod's own certificate.

Pods are reached by their IP addresses, which no certificate contains. So every pod's certificate has the same DNS name, and
that name is checked, as Knative's activator does for `kn-user-{namespace}` (knative/serving
pkg/activator/certificate/tls_context.go).
"""

import logging
import os
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

_log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 1.0  # least time between two checks whether files have changed
# Codes of X509_verify_cert (openssl/x509_vfy.h) → what is wrong and what to do.
_VERIFY: Final = {
    9: "its certificate is not valid yet: compare the clocks",
    10: "its certificate has expired: renew it",
    62: "its certificate does not have the name of the pipeline's pods: compare it with LAMINA_TLS_NAME",
    **dict.fromkeys((7, 18, 19, 20, 21), "its certificate is not of the CA in LAMINA_TLS_CA: give both pods the same CA"),
}


class UnusableTLSFiles(Exception):
    """A certificate, key or CA cannot be read. The message names the file."""


class PodTLS:
    """The settings of TLS connections between pods. Thread-safe.

    Changed files are read again for the next connection. If they cannot be used, the earlier ones stay in use, and an error is
    logged.
    """

    def __init__(self, ca: str, name: str, certificate: str | None = None, key: str | None = None) -> None:
        """Reads the PEM files at the paths `ca`, `certificate` and `key`.

        Certificates of other pods must have the DNS name `name`. If `certificate` is None, this pod can connect to others but
        cannot accept connections. Raises UnusableTLSFiles.
        """
        self.name = name
        self._ca, self._certificate, self._key = ca, certificate, key
        self._lock = threading.Lock()
        self._state = self._read_state()
        self._client, self._server = self._contexts()
        self._check_at = time.monotonic() + _CHECK_SECONDS

    def client(self) -> ssl.SSLContext:
        """Returns the TLS settings for a connection to another pod. The caller passes `name` as `server_hostname`."""
        self._read_changed_files()
        return self._client

    def server(self) -> ssl.SSLContext:
        """Returns the TLS settings for connections from other pods, which must show a certificate of the CA; see `admits`.

        Call it only if this pod has a certificate.
        """
        self._read_changed_files()
        assert self._server is not None
        return self._server

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """Returns whether a client's certificate (from `SSLSocket.getpeercert`) has the name of the pipeline's pods."""
        return ("DNS", self.name) in ((certificate or {}).get("subjectAltName") or ())

    def _read_changed_files(self) -> None:
        if time.monotonic() < self._check_at or not self._lock.acquire(blocking=False):
            return
        try:
            self._check_at = time.monotonic() + _CHECK_SECONDS
            state = self._read_state()
            if state != self._state:
                self._client, self._server = self._contexts()
                self._state = state
                _log.info("the certificates between pods were renewed")
        except UnusableTLSFiles as error:
            _log.error("%s; the earlier certificates stay in use", error)
        finally:
            self._lock.release()

    def _read_state(self) -> list[tuple[int, ...]]:
        """Returns a value that changes when a file is written to or replaced, as Kubernetes does with mounted files."""
        try:
            found = [os.stat(path) for path in (self._ca, self._certificate, self._key) if path is not None]
            return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]
        except OSError as error:
            raise UnusableTLSFiles(f"{error.filename}: {error.strerror}; is the Secret with it mounted?") from error

    def _contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext | None]:
        ca, certificate, key = self._ca, self._certificate, self._key
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server = None if certificate is None else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if server is not None:
            server.verify_mode = ssl.CERT_REQUIRED
        for context in (client, server):
            if context is None:
                continue
            context.minimum_version = ssl.TLSVersion.TLSv1_3  # as Knative's activator and queue-proxy
            try:
                context.load_verify_locations(ca)
            except (OSError, ValueError) as error:
                raise UnusableTLSFiles(f"{ca}: no CA certificates in PEM ({error})") from error
            if certificate is not None:
                try:
                    context.load_cert_chain(certificate, key)
                except (OSError, ValueError) as error:
                    raise UnusableTLSFiles(f"{certificate}, {key}: no certificate with its key in PEM ({error})") from error
        return client, server


def tls_problem(error: Exception) -> str:
    """Describes why a connection failed. For a TLS error the text also says what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{_VERIFY.get(error.verify_code, 'its certificate is not accepted')} ({error.verify_message})"
    if is_refusal(error):
        return f"it refuses this pod's certificate, or none was shown ({error})"
    return str(error) or type(error).__name__


def is_refusal(error: Exception) -> bool:
    """Returns whether the server refused the client's certificate. With TLS 1.3 this shows only at the client's first read."""
    return isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "")
