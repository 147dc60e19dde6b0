"""Parsers of settings: each turns a text into a value, or raises a ValueError that says what is allowed."""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from functions.configuration.api_keys import ApiKey, parse_keys

MAX_SECONDS = 10_000_000  # about 115 days; waits for a lock are limited to about 9e9 (threading.TIMEOUT_MAX)

LayerRange = tuple[int, int]
T = TypeVar("T")


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return parse


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    allowed = f"a whole number from {lowest}" + (f" to {highest}" if highest is not None else "")

    def parse(value: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", value):
            raise ValueError(allowed)
        number = int(value)
        if number < lowest or (highest is not None and number > highest):
            raise ValueError(allowed)
        return number

    return parse


def json_object(type_: type[T], allowed: str) -> Callable[[str], T]:
    """Returns a parser of JSON objects with the fields of `type_`. `allowed` describes them in error messages."""

    def parse(value: str) -> T:
        try:
            return msgspec.json.decode(value, type=type_)
        except msgspec.MsgspecError as error:
            raise ValueError(f"an object of JSON {allowed} ({error})") from error

    return parse


def seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= MAX_SECONDS:
        raise ValueError(f"seconds, more than 0, at most {MAX_SECONDS}")
    return number


def seconds_or_zero(value: str) -> float:
    return 0.0 if value == "0" else seconds(value)


def fingerprint(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", value):
        raise ValueError("32 hexadecimal digits, as `python -m knative plan` prints them")
    return value


def address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError as error:
        raise ValueError("an IP address, such as 0.0.0.0") from error


def layers(value: str) -> LayerRange:
    """Parses a layer range: `10:20` → (10, 20)."""
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", value)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError("FIRST:LAST with FIRST before LAST, such as 10:20 for layers 10 to 19")
    return int(match[1]), int(match[2])


def weights(value: str) -> tuple[tuple[str, str], ...]:
    """Parses the weights of each layer group: `int8=<digest>,bfloat16=<digest>` → (("int8", <digest>), …)."""
    found = [part.partition("=") for part in value.split(",")]
    if not all(dtype and equals and digest for dtype, equals, digest in found):
        raise ValueError("DTYPE=DIGEST of each layer group, separated by commas")
    return tuple((dtype, digest) for dtype, _, digest in found)


def cut(value: str) -> tuple[LayerRange, ...]:
    """Parses a cut: `0:10,10:20` → ((0, 10), (10, 20)). It must begin at 0 and have no gaps."""
    groups = tuple(layers(part) for part in value.split(","))
    ends = [0, *(last for _, last in groups)]
    for (first, last), end in zip(groups, ends, strict=False):
        if first != end:
            raise ValueError(f"layer groups without gaps, from layer 0: {first}:{last} should begin at {end}")
    return groups


def url(value: str) -> str:
    """Parses an http or https URL and returns it without its trailing slash."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("a URL that begins with http:// or https://")
    _ = parts.port  # raises ValueError if it is no number
    return value.rstrip("/")


def bucket_and_prefix(value: str) -> tuple[str, str]:
    """Parses a place in a store: `lamina/kv` → ("lamina", "kv")."""
    bucket, _, prefix = value.partition("/")
    if not bucket or not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*", prefix):
        raise ValueError("BUCKET/PREFIX, such as lamina/kv")
    return bucket, prefix


def key_256(value: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("64 hexadecimal digits, as `openssl rand -hex 32` prints them")
    return bytes.fromhex(value)


def kubernetes_api(value: str) -> str:
    """Parses the URL of a Kubernetes API; `cluster` stands for the API of the pod's own cluster."""
    return value if value == "cluster" else url(value)


def stages(value: str) -> tuple[tuple[LayerRange, str], ...]:
    """Parses layer ranges with URLs: `0:10=http://a,10:20=http://b` → (((0, 10), "http://a"), …)."""
    pairs = []
    for part in value.split(","):
        group, equals, address = part.partition("=")
        if not equals:
            raise ValueError(f"FIRST:LAST=URL, separated by commas; {part!r} has no '='")
        pairs.append((layers(group), url(address)))
    return tuple(pairs)


def services(value: str) -> tuple[str, ...]:
    """Parses names of Services: `chat-1f0a-s0,chat-1f0a-s1` → ("chat-1f0a-s0", "chat-1f0a-s1")."""
    names = tuple(value.split(","))
    if not all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names):
        raise ValueError("names of Services, separated by commas")
    return names


def targets(value: str) -> tuple[float, ...]:
    """Parses a concurrency for each stage: `1.4,1.4,0` → (1.4, 1.4, 0.0)."""
    try:
        found = tuple(float(part) for part in value.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= each < 1e6 for each in found):
        raise ValueError("numbers from 0 on, separated by commas")
    return found


def keys(value: str) -> tuple[ApiKey, ...]:
    """Parses a list of API keys. Refuses an empty list, a mistake that would shut out all clients."""
    found = parse_keys(value)
    if not found:
        raise ValueError("at least one key")
    return found


def paths(value: str) -> tuple[str, ...]:
    """Parses paths of files: `/etc/a, /etc/b` → ("/etc/a", "/etc/b")."""
    found = tuple(part.strip() for part in value.split(","))
    if not all(found):
        raise ValueError("paths of files, separated by commas, none of them empty")
    return found


def limits_store(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ValueError("a URL that begins with redis:// or rediss://")
    return value


def origins(value: str) -> tuple[str, ...]:
    """Parses web origins as browsers send them (RFC 6454, section 6.2): `https://a.example,http://localhost:3000`.

    `*` stands for all origins.
    """
    found = tuple(part.strip() for part in value.split(","))
    for each in found:
        parts = urlsplit(each)
        if each != "*" and (not parts.hostname or f"{parts.scheme}://{parts.netloc}".lower() != each or "@" in each):
            raise ValueError("origins such as https://chat.example, without a path, in lower case, separated by commas; or *")
    return found


def hosts(value: str) -> tuple[str, ...]:
    """Parses host names: `chat.example,*.corp.example`. `*` stands for any name."""
    names = tuple(part.strip() for part in value.split(","))
    if not all(re.fullmatch(r"\*|(\*\.)?[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name) for name in names):
        raise ValueError("names such as chat.example or *.example, in lower case, without a port, separated by commas; or *")
    return names


def networks(value: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Parses IP networks: `10.244.0.0/16,fd00:10:244::/56`. A cluster may have IPv4 and IPv6 pods."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(","))
    except ValueError as error:
        raise ValueError(f"networks such as 10.244.0.0/16, separated by commas ({error})") from error
