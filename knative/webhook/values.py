"""Parses numbers, durations, quantities and names as Go and Kubernetes do, which Python's own parsers do not.

Every `parse_` function raises ValueError; the message says what was seen.
"""

import math
import re
from fractions import Fraction
from typing import Final

MAX_INT32: Final = 2**31 - 1
NANOSECONDS: Final = 1_000_000_000

_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_FLOAT: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity)|nan", re.IGNORECASE)
_DURATION_PART: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_UNIT_NANOSECONDS: Final = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": NANOSECONDS,
    "m": 60 * NANOSECONDS,
    "h": 3600 * NANOSECONDS,
}
QUANTITY: Final = re.compile(
    r"(?P<number>[+-]?([0-9]+\.?[0-9]*|\.[0-9]+))"
    r"(?P<suffix>[KMGTPE]i|[numkMGTPE]|[eE](?P<exponent>[+-]?[0-9]+))?"
)  # Kubernetes' resource.Quantity: 500m, 1.5Gi, 2e3
_SUFFIX_FACTOR: Final[dict[str, Fraction]] = {
    **{unit: Fraction(10) ** power for unit, power in zip("num", (-9, -6, -3), strict=True)},
    **{unit: Fraction(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}

_DNS_1035_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1123_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_1123_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME_PART: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def parse_int(text: str) -> int:
    """Reads an integer as strconv.ParseInt does in base 10, of any size."""
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not an integer")
    return int(text)


def parse_float(text: str) -> float:
    """Reads a number as strconv.ParseFloat does; NaN and infinities are numbers."""
    if not _FLOAT.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def parse_duration(text: str) -> int:
    """Reads a duration such as 1m30s, 1.5h or 0 as time.ParseDuration does; returns nanoseconds."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if digits == "0":
        return 0
    parts = list(_DURATION_PART.finditer(digits))
    if not parts or "".join(part.group() for part in parts) != digits:
        raise ValueError(f"{text!r} is not a duration such as 30s or 1m30s")
    nanoseconds = sum(Fraction(part[1]) * _UNIT_NANOSECONDS[part[2]] for part in parts)
    if nanoseconds >= 2**63:
        raise ValueError(f"{text!r} is longer than any duration may be")
    return sign * math.floor(nanoseconds)


def parse_quantity(value: str | float) -> Fraction:
    """Reads a Kubernetes quantity, such as 500m or 1Gi; returns it in its base unit: cores, bytes, pieces."""
    match = QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no Kubernetes quantity, such as 500m, 2 or 512Mi")
    number = Fraction(match["number"])
    if match["exponent"] is not None:
        return number * Fraction(10) ** int(match["exponent"])
    return number * _SUFFIX_FACTOR[match["suffix"]] if match["suffix"] else number


def is_dns_1035_label(name: str, *, is_prefix: bool = False) -> bool:
    """Whether a Service, revision or tag may have this name: like a DNS 1123 label, and its first character is a letter.

    is_prefix: `name` is only the beginning of a generated name, and may end with a hyphen.
    """
    if is_prefix and name.endswith("-"):
        name = name[:-1] + "a"
    return len(name) <= 63 and bool(_DNS_1035_LABEL.fullmatch(name))


def is_dns_1123_label(name: str) -> bool:
    """Whether a container or volume may have this name: a-z, 0-9 and inner hyphens, at most 63 characters."""
    return len(name) <= 63 and bool(_DNS_1123_LABEL.fullmatch(name))


def is_dns_1123_subdomain(name: str) -> bool:
    """Whether a ServiceAccount, Secret or ConfigMap may have this name: DNS 1123 labels that are joined by dots."""
    return len(name) <= 253 and bool(_DNS_1123_SUBDOMAIN.fullmatch(name))


def is_qualified_name(name: str) -> bool:
    """True for keys of labels, annotations and resources: `name` or `prefix.example/name`."""
    prefix, slash, rest = name.rpartition("/")
    if slash and not is_dns_1123_subdomain(prefix):
        return False
    return len(rest) <= 63 and bool(_NAME_PART.fullmatch(rest))


def is_label_value(value: str) -> bool:
    return not value or (len(value) <= 63 and bool(_NAME_PART.fullmatch(value)))
