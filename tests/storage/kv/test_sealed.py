"""Sealed objects: only their own key opens them, and only under their own name."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import SealBroken
from storage.kv.sealed import KEY_BYTES, Sealer
from tests.support.paths import ROOT

SEALER = Sealer(bytes(range(KEY_BYTES)))


@given(st.binary(max_size=2000))
def test_opening_reverses_sealing(plain: bytes) -> None:
    sealed = SEALER.seal("kv/p/0-10/a", plain)
    assert SEALER.open("kv/p/0-10/a", sealed) == plain
    assert len(plain) < 8 or plain not in sealed


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_changed_bit_is_detected(plain: bytes, data: st.DataObject) -> None:
    sealed = SEALER.seal("name", plain)
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealBroken):
        SEALER.open("name", sealed)


@given(st.binary(max_size=200), st.data())
def test_truncation_is_detected(plain: bytes, data: st.DataObject) -> None:
    sealed = SEALER.seal("name", plain)
    with pytest.raises(SealBroken):
        SEALER.open("name", sealed[: data.draw(st.integers(0, len(sealed) - 1))])


def test_another_key_or_another_name_opens_nothing() -> None:
    sealed = SEALER.seal("name", b"text")
    for sealer, name in ((Sealer(os.urandom(KEY_BYTES)), "name"), (SEALER, "another name")):
        with pytest.raises(SealBroken, match="another key"):
            sealer.open(name, sealed)


def test_no_nonce_is_used_twice() -> None:
    assert len({bytes(SEALER.seal("name", b"text")[:16]) for _ in range(1000)}) == 1000


def test_names_are_of_the_key_and_tell_parts_apart() -> None:
    names = {SEALER.name(b"ab", b"c"), SEALER.name(b"a", b"bc"), SEALER.name(b"abc"), Sealer(b"k" * 32).name(b"ab", b"c")}
    assert len(names) == 4
    assert SEALER.name(b"ab", b"c") == SEALER.name(b"ab", b"c")


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        Sealer(b"k" * 31)


def test_a_sealer_does_not_import_cryptography_at_the_start() -> None:
    code = "import sys; from storage.kv.sealed import Sealer; Sealer(bytes(32)); sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
