"""One run at a time holds the state folder; the next one finds what a killed run left."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from knative.commands.local_pipeline import kept_kv_key
from knative.commands.state_folder import RunningPlatform, StateError, StateFolder, find_running
from storage.kv.sealed import KEY_BYTES


def test_a_second_run_is_told_where_the_first_is(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as state:
        state.publish(RunningPlatform(pid=os.getpid(), admin_url="http://a", gateway_url="http://127.0.0.1:8080"))
        with pytest.raises(StateError, match=rf"process {os.getpid()}, serving http://127\.0\.0\.1:8080.*--state"):
            StateFolder(tmp_path / "state").__enter__()
        assert find_running(tmp_path / "state") is not None
    assert find_running(tmp_path / "state") is None
    with StateFolder(tmp_path / "state") as again:
        assert not again.recovered


def test_a_run_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        state.publish(RunningPlatform(pid=1, admin_url="http://a", gateway_url="http://g"))
        (state.logs / "pod.log").write_text("last words")
        left = (tmp_path / "platform.json").read_bytes()
    (tmp_path / "platform.json").write_bytes(left)
    assert find_running(tmp_path) is None
    with StateFolder(tmp_path) as state:
        assert state.recovered
        assert list(state.logs.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/state: cannot be used: Not a directory; .*--state"):
        StateFolder(tmp_path / "file" / "state").__enter__()


def test_only_the_owner_can_read_the_stores_keys(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        state.publish(RunningPlatform(pid=1, admin_url="http://a", gateway_url="http://g"))
        assert (tmp_path / "platform.json").stat().st_mode & 0o077 == 0


def test_a_key_that_a_killed_run_did_not_write_is_made_by_the_next(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr("secrets.token_hex", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kept_kv_key(tmp_path)
    key = kept_kv_key(tmp_path)
    assert len(bytes.fromhex(key)) == KEY_BYTES
    assert kept_kv_key(tmp_path) == key
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("")  # left by an earlier release
    assert len(bytes.fromhex(kept_kv_key(tmp_path))) == KEY_BYTES
