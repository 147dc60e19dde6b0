"""boto3's requests over paced connections: its own have a timeout for each byte and none for all of them.

botocore asks whoever has registered for `before-send` for an answer before it sends a request itself.
"""

import io
import ssl
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, Final, cast
from urllib.parse import urlsplit

from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, HTTPClientError, ReadTimeoutError, SSLError
from botocore.httpsession import get_cert_path

from storage.store.paced import TooSlow, connect

_READ_BYTES: Final = 2**16


class PacedSender:
    """Register it for `before-send.s3`. Behind a proxy for the endpoint botocore goes on as it does, without a pace."""

    def __init__(self, endpoint_url: str, stall_seconds: float) -> None:
        parts = urlsplit(endpoint_url)
        proxies = urllib.request.getproxies()
        self._proxied = parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or "")
        self._endpoint_url = endpoint_url
        self._stall_seconds = stall_seconds
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https" and not self._proxied:
            self._tls = ssl.create_default_context(cafile=get_cert_path(True))
            self._tls.load_default_certs()  # SSL_CERT_FILE, too

    def __call__(self, request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if self._proxied:
            return None
        try:
            return self._send(request)
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=request.url, error=error) from error
        except TooSlow as error:
            raise HTTPClientError(error=error) from error
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error
        except (ConnectionRefusedError, ConnectionAbortedError) as error:
            raise EndpointConnectionError(endpoint_url=request.url, error=error) from error
        except (HTTPException, OSError) as error:
            raise ConnectionClosedError(error=error, request=request, endpoint_url=request.url) from error

    def _send(self, request: AWSPreparedRequest) -> AWSResponse:
        connection = connect(self._endpoint_url, self._stall_seconds, self._tls)
        try:
            url = urlsplit(request.url)
            # The body goes at once: whoever refuses it says so on a connection that is closed after it.
            headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
            target = f"{url.path}?{url.query}" if url.query else url.path
            connection.request(request.method, target, cast("Any", request.body), headers)
            with connection.getresponse() as response:
                return AWSResponse(request.url, response.status, cast("Any", response.headers), _Body(response.read()))
        finally:
            connection.close()


class _Body(io.BytesIO):
    """What botocore reads an answer from."""

    def stream(self, amount: int = _READ_BYTES, **_: Any) -> Iterator[bytes]:
        while piece := self.read(amount):
            yield piece
