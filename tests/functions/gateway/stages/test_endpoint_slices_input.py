"""Untrusted replies of the Kubernetes API: only declared errors, and each byte is read once."""

import ipaddress
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from eventing.http.pod_network import PodNetwork
from functions.gateway.stages import kubernetes_api
from functions.gateway.stages.endpoints import Slice, endpoints_of
from functions.gateway.stages.kubernetes_api import (
    KubernetesError,
    ObjectList,
    Unreadable,
    lines_of,
    read_event,
    read_status,
    reader,
)
from tests.support.steps import lines

PODS = PodNetwork((ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/8")), 8012)
READERS: tuple[Callable[[bytes], object], ...] = (reader(ObjectList[Slice]), read_event, reader(Slice), read_status)
HOSTS = st.sampled_from(["10.1.0.5", "10.1.0.5/16", "fd00::1", "fd00::1%eth0", "", "a.example", "010.1.0.5", "10.1.0.5\n"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=8) | HOSTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OR_ANYTHING = JSON | st.just({})
METADATA = st.fixed_dictionaries({}, optional={"name": OR_ANYTHING, "resourceVersion": OR_ANYTHING, "labels": OR_ANYTHING})
ADDRESS = st.fixed_dictionaries(
    {},
    optional={
        "addresses": st.lists(HOSTS, max_size=3) | JSON,
        "conditions": st.dictionaries(st.sampled_from(["ready", "terminating"]), st.none() | st.booleans()) | JSON,
    },
)
PORT = st.fixed_dictionaries({}, optional={"port": st.just(8012) | JSON, "name": st.just("http") | JSON})
SLICE = st.fixed_dictionaries(
    {"metadata": METADATA | JSON},
    optional={"endpoints": st.lists(ADDRESS, max_size=3) | JSON, "ports": st.lists(PORT, max_size=3) | JSON},
)
DOCUMENTS = st.one_of(
    SLICE,
    st.fixed_dictionaries({"metadata": METADATA, "items": st.lists(SLICE, max_size=3)}),
    st.fixed_dictionaries({"type": st.sampled_from(["ADDED", "ERROR", "BOOKMARK"]) | JSON, "object": SLICE | JSON}),
    JSON,
)


def read(reader: Callable[[bytes], object], data: bytes) -> object:
    try:
        return reader(data)
    except Unreadable:
        return None


@given(DOCUMENTS)
def test_any_document(document: Any) -> None:
    for read_one in READERS:
        found = read(read_one, json.dumps(document).encode())
        if isinstance(found, Slice):
            for endpoint in endpoints_of([found], PODS).endpoints:
                assert endpoint.url in ("http://10.1.0.5:8012", "http://[fd00::1]:8012"), "what may be followed"


@given(
    st.binary(max_size=100)
    | st.sampled_from([b"[" * 100_000, b'{"metadata":' * 100_000, b'{"metadata":{"labels":{"a":"\xff"}}}'])
)
def test_any_bytes(data: bytes) -> None:
    for read_one in READERS:
        read(read_one, data)


class Stream:
    """The stream of a watch."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = iter(parts)

    def read1(self, _: int) -> bytes:
        return next(self._parts, b"")


def read_lines(parts: list[bytes]) -> list[bytes]:
    return list(lines_of(cast("urllib3.BaseHTTPResponse", Stream(parts))))


@given(st.lists(st.binary(min_size=1, max_size=6) | st.sampled_from([b"\n", b"\n\n", b"{}\n{}"])))
def test_lines_are_the_same_however_they_are_cut(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert read_lines(parts) == [line for line in whole.split(b"\n")[:-1] if line]


class CountingBytes(bytes):
    """Counts how many bytes are copied to have it behind others."""

    copied = 0

    def __radd__(self, other: bytes) -> bytes:
        CountingBytes.copied += len(other)
        return other + bytes(self)


def test_a_line_that_comes_in_crumbs_is_put_together_once() -> None:
    counted = []
    for count in (500, 1000):
        crumbs = [CountingBytes(b"x" * 10) for _ in range(count)]
        counted.append(lines(lambda crumbs=crumbs: read_lines([*crumbs, b"\n"])))  # type: ignore[misc]
    assert counted[1] < 2.2 * counted[0]
    assert CountingBytes.copied <= 10 * 1500


def test_a_line_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "_MAX_LINE_BYTES", 1000)
    assert read_lines([b"x" * 999, b"x\n"]) == [b"x" * 1000]
    with pytest.raises(KubernetesError, match="a line of more than 1000 bytes"):
        read_lines([b"x" * 999, b"xx", b"\n"])
