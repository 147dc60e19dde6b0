"""queue-proxy's certificate with Knative's system-internal-tls, from the Secret `serving-certs` of the namespace."""

import logging
import ssl
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

SERVING_CERTS: Final = "serving-certs"  # knative/serving pkg/networking/constants.go


class ServingCerts:
    """The TLS settings of queue-proxies. Changed files are read again for the next connection.

    As Knative's queue-proxy (pkg/queue/sharedmain/main.go) it shows the certificate, asks clients for none, and speaks TLS 1.3.
    """

    def __init__(self, folder: Path) -> None:
        """folder: the folder that contains tls.crt and tls.key. Raises OSError for files that cannot be used."""
        self._files = (folder / "tls.crt", folder / "tls.key")
        self._state = self._read_state()
        self._current = self._load()
        self.listening = self._load()
        self.listening.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        try:
            if (state := self._read_state()) != self._state:
                self._current, self._state = self._load(), state
        except OSError as error:
            _log.error("the changed certificate in %s cannot be used: %s", self._files[0].parent, error)
        connection.context = self._current

    def _read_state(self) -> list[tuple[int, int, int]]:
        found = [file.stat() for file in self._files]
        return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(*self._files)
        return context
