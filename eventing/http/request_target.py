"""Parses the target of an HTTP/1.1 request and its authority (RFC 9112, section 3.2)."""

import re
from typing import Final

# What a Host header may be: a host, with a port or without, or nothing (RFC 9110, section 7.2; RFC 3986, section 3.2, without
# user information, which RFC 9110, section 4.2.4, wants refused).
AUTHORITY: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25[\w.~-]+)?\]|[\w.~!$&'()*+,;=%-]*)(?::[0-9]*)?", re.ASCII)
_ABSOLUTE: Final = re.compile(r"https?://([^/?]+)([^?]*)(.*)", re.IGNORECASE | re.DOTALL)


def read_target(method: str, target: str) -> tuple[str, str | None]:
    """Returns the path and query (or `*`) of a request's target, and the authority if the target contains one.

    Such an authority overrules the Host header. Raises ValueError if the target has a fragment or a form that the method does
    not allow. CONNECT is not supported.
    """
    shown = repr(target if len(target) <= 80 else f"{target[:77]}...")
    if "#" in target:
        raise ValueError(f"the request target {shown} has a fragment; leave it out")
    if target.startswith("/"):
        return target, None
    if target == "*":
        if method != "OPTIONS":
            raise ValueError(f"the request target * is for OPTIONS, and the method is {method}; send a path")
        return target, None
    found = _ABSOLUTE.fullmatch(target)
    if found is None or not AUTHORITY.fullmatch(found[1]):
        raise ValueError(f"the request target {shown} is neither a path nor an http URL")
    path = found[2] or ("*" if method == "OPTIONS" and not found[3] else "/")  # RFC 9112, section 3.2.4
    return path + found[3], found[1]
