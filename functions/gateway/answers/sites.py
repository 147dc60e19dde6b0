"""Keeps pages of other sites from using a gateway through the browser of a person who can reach the gateway.

A page may give a gateway's address a name of the page's own site (DNS rebinding). A page may also send some requests to other
sites without their consent (Fetch Standard, section 3.2.2). Programs other than browsers are not affected by anything here.
"""

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from eventing.problems import CrossSite, UnknownHost, UnsupportedMediaType
from eventing.wire.framing import JSONL_CONTENT_TYPE, is_json, media_type
from functions.configuration.config import FleetConfig, GatewayConfig

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# No page of the internet has a name that ends so: RFC 6761, ICANN's reservation of .internal, and Kubernetes' DNS.
_LOCAL_DOMAINS: Final = ("localhost", "internal", "svc", "svc.cluster.local")
_MAX_HOST_CHARACTERS: Final = 300  # of a name with a port
_SHOWN_CHARACTERS: Final = 80
_ANY: Final = "*"


class Sites:
    """The host names to which a gateway answers, and the origins of the pages that may use it. Thread-safe."""

    def __init__(self, config: GatewayConfig | FleetConfig, *, is_open: bool) -> None:
        """If `is_open`, the gateway has no API keys. With keys any host name is accepted, because a foreign page has no key."""
        self._origins = frozenset(config.cors_origins or ())
        hosts = config.hosts or ()
        self._any_host = not is_open or _ANY in hosts
        self._names = frozenset(host for host in hosts if not host.startswith("*."))
        self._domains = (*_LOCAL_DOMAINS, *(host[2:] for host in hosts if host.startswith("*.")))
        # Knative's ingress answers only to names of its Services, so it has checked a name such as chat.default.example.org.
        behind_ingress = config.service is not None and not ipaddress.ip_address(config.listen).is_loopback
        self._service = (config.service or "", config.namespace) if behind_ingress else None
        self._answers_to = lru_cache(maxsize=256)(self._is_own_host)

    def check(self, environ: "WSGIEnvironment") -> None:
        """Raises UnknownHost or CrossSite for a request that a page of another site may have sent.

        A request without a Host (HTTP/1.0) passes the check of the host, because no browser sends one.
        """
        host = environ.get("HTTP_HOST", "")
        if host and not self._any_host and not (len(host) <= _MAX_HOST_CHARACTERS and self._answers_to(host)):
            raise UnknownHost(
                f"{host[:_SHOWN_CHARACTERS]} is no name of this gateway, which has no API keys; ask it by an IP address or as "
                "localhost, list the name in gateway.hosts (LAMINA_HOSTS), or give it keys"
            )
        if self._is_cross_site(environ, host):
            origin = environ.get("HTTP_ORIGIN", "without an Origin")[:_SHOWN_CHARACTERS]
            raise CrossSite(
                f"the request comes from a page of another site ({origin}); list its origin in gateway.cors_origins "
                "(LAMINA_CORS_ORIGINS)"
            )

    def _is_own_host(self, host: str) -> bool:
        name = host.lower().rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host.lower().removesuffix(":")
        try:
            ipaddress.ip_address(name.strip("[]").partition("%")[0])
        except ValueError:
            name = name.removesuffix(".")
        else:
            return True
        first, *others = name.split(".")
        if not others or name in self._names or any(name.endswith(f".{domain}") for domain in self._domains):
            return True  # no page of the internet has a name of one label
        if self._service is None:
            return False
        service, namespace = self._service
        tagged = first.endswith(f"-{service}")  # the tag of a traffic target
        return (first == service or tagged) and others[0] == namespace

    def _is_cross_site(self, environ: "WSGIEnvironment", host: str) -> bool:
        """Returns whether a page of another site sent the request, by the rules of Go's http.CrossOriginProtection.

        Here the rules also apply to GET, because a stream that a page opens occupies a thread.
        """
        method, origin = environ["REQUEST_METHOD"], environ.get("HTTP_ORIGIN")
        if method == "OPTIONS" or _ANY in self._origins or origin in self._origins:
            return False
        site = environ.get("HTTP_SEC_FETCH_SITE")
        if site is None:  # no browser, an old one, or a page that came by plain HTTP
            return origin is not None and origin.partition("://")[2].lower() != host.lower()
        if site in ("same-origin", "none"):
            return False
        followed_link = method in ("GET", "HEAD") and environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
        return not followed_link


def check_media_type(environ: "WSGIEnvironment") -> None:
    """Raises UnsupportedMediaType unless the Content-Type of the request says JSON.

    Pages may send text/plain and forms to other sites, so these are refused. Events may also be JSON lines, or have no
    Content-Type.
    """
    content_type = environ.get("CONTENT_TYPE", "")
    if is_json(content_type):
        return
    is_event = environ["PATH_INFO"] == "/"
    if is_event and media_type(content_type) == JSONL_CONTENT_TYPE:  # of a batch
        return
    if is_event and not content_type and "HTTP_CE_SPECVERSION" in environ:
        return  # an event without data, or whose data is elsewhere
    seen = f"the content type is {content_type[:_SHOWN_CHARACTERS]}" if content_type else "there is no content type"
    form = ", as curl -d sends it" if content_type.startswith("application/x-www-form-urlencoded") else ""
    more = ", application/cloudevents+json or application/cloudevents-batch+json" if is_event else ""
    raise UnsupportedMediaType(f"{seen}{form}; send Content-Type: application/json{more}")
